"""Signing in and out."""

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from clients.errors import NotAllowedError
from clients.web.site import Site, form_of


async def sign_in(request: Request) -> Response:
    """Asks for an API key, or for a name on a server without keys."""
    site: Site = request.app.state.site
    if request.method == "GET":
        return await _ask(request, "")
    form = await form_of(request)
    response = RedirectResponse("/", 303)
    try:
        await site.doorkeeper.sign_in(response, key=form["key"].strip(), name=form["name"].strip())
    except (NotAllowedError, ValueError) as error:
        return await _ask(request, str(error))
    return response


async def sign_out(request: Request) -> Response:
    """Deletes the sign-in cookies."""
    site: Site = request.app.state.site
    response = RedirectResponse("/sign-in", 303)
    site.doorkeeper.sign_out(response)
    return response


async def _ask(request: Request, problem: str) -> Response:
    site: Site = request.app.state.site
    return await site.page(
        request,
        None,
        "sign_in.html.j2",
        status=403 if problem else 200,
        problem=problem,
        needs_key=await site.doorkeeper.needs_key(),
    )


ROUTES = [
    Route("/sign-in", sign_in, methods=["GET", "POST"]),
    Route("/sign-out", sign_out, methods=["POST"]),
]
