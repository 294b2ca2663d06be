{{- define "prefloop.labels" -}}
app.kubernetes.io/name: prefloop
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "prefloop.name" -}}
{{ printf "%s-%s" .root.Release.Name .component }}
{{- end }}

{{- /* What all of our pods have. Services would set variables that look like settings of ours. */ -}}
{{- define "prefloop.pod" -}}
enableServiceLinks: false
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "prefloop.container" -}}
image: {{ .root.Values.image | quote }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- /* The page and Ray's nodes have no use for the store's password. */ -}}
{{- if has .component (list "server" "votes" "learner") }}
envFrom:
  - secretRef: {name: {{ .root.Values.secrets.environment }}}
{{- end }}
env:
{{- range $name, $value := mergeOverwrite (dict) .own .root.Values.settings .values.settings }}
  - {name: {{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
resources:
  requests: {{ toYaml .values.resources.requests | nindent 4 }}
  limits:
    {{- toYaml .values.resources.limits | nindent 4 }}
    {{- if .values.gpus }}
    nvidia.com/gpu: {{ .values.gpus }}
    {{- end }}
{{- end }}

{{- define "prefloop.stored" -}}
PREFLOOP_STORE_URL: {{ required "store.url: the PostgreSQL database" .Values.store.url | quote }}
PREFLOOP_POLICY_URL: {{ required "storage.url: where versions are kept" .Values.storage.url | quote }}
{{- end }}
