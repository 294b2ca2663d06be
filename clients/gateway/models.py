"""/v1/models: what serves, and every version that can answer now."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from clients.gateway.bodies import MODEL, no_model
from clients.gateway.callers import Callers


async def list_models(request: Request) -> JSONResponse:
    return JSONResponse({"object": "list", "data": await _models(request)})


async def get_model(request: Request) -> JSONResponse:
    name = request.path_params["model"]
    for model in await _models(request):
        if model["id"] == name:
            return JSONResponse(model)
    raise no_model(name)


async def _models(request: Request) -> list[dict[str, Any]]:
    callers: Callers = request.app.state.callers
    versions = await (await callers.client(request)).versions()
    times = {f"{MODEL}@{one.policy_version}": one.create_time.seconds for one in versions}
    return [
        {"id": name, "object": "model", "created": created, "owned_by": MODEL}
        for name, created in {MODEL: versions[0].create_time.seconds, **times}.items()
    ]
