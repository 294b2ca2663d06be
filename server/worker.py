"""What runs inside vLLM's worker for a swap: read ahead of the pause, apply within it.

vLLM calls these methods through `collective_rpc` on its worker (`worker_extension_cls`). The engine does not step while
one of them runs, so reading happens on a thread and `prefloop_staged` only asks how far it is.
"""

import threading
from pathlib import Path
from typing import Any

import torch


class SwapExtension:
    """Mixed into the worker; the names are prefixed because they share its namespace."""

    model_runner: Any

    def prefloop_stage(self, directory: str) -> None:
        """Begins to read the weights in `directory` into memory."""
        self._prefloop_tensors: dict[str, torch.Tensor] = {}
        self._prefloop_error = ""
        self._prefloop_thread = threading.Thread(target=self._prefloop_read, args=(directory,), daemon=True)
        self._prefloop_thread.start()

    def prefloop_staged(self) -> str | None:
        """None while reading; then why the weights cannot be used, or an empty string."""
        return None if self._prefloop_thread.is_alive() else self._prefloop_error

    def prefloop_apply(self) -> None:
        """Loads what was read. Call it only while the engine is paused."""
        tensors, self._prefloop_tensors = self._prefloop_tensors, {}
        self.model_runner.reload_weights(weights_iterator=iter(tensors.items()))

    def prefloop_drop(self) -> None:
        """Forgets what was read."""
        self._prefloop_tensors = {}

    def _prefloop_read(self, directory: str) -> None:
        from safetensors import safe_open

        try:
            for path in sorted(Path(directory).glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                        tensor = file.get_tensor(name)
                        if not torch.isfinite(tensor).all():
                            raise ValueError(f"{name} has values that are not finite")
                        self._prefloop_tensors[name] = tensor
        # A thread has nobody to raise to: the caller of prefloop_staged gets the reason.
        except Exception as error:
            self._prefloop_error = f"{Path(directory).name}: {error}"
