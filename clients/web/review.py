"""Pairs of answers to compare, one after another, apart from the chats."""

from prefloop.v1.feedback_pb2 import CHOICE_UNSPECIFIED
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from clients.web.chat import CHOICES
from clients.web.site import enter, form_of


async def show(request: Request) -> Response:
    site, person = await enter(request)
    found = await person.client.review()
    return await site.page(
        request,
        person,
        "review.html.j2",
        review=found.review if found.HasField("review") else None,
        waiting=found.waiting,
        voted="voted" in request.query_params,
    )


async def choose(request: Request) -> Response:
    """Sends the choice, or skips the pair, and shows the next one."""
    _, person = await enter(request)
    form = await form_of(request)
    if form["choice"] == "skip":
        await person.client.skip_review(form["comparison_id"])
        return RedirectResponse("/review", 303)
    await person.client.choose(form["comparison_id"], CHOICES.get(form["choice"], CHOICE_UNSPECIFIED))
    return RedirectResponse("/review?voted", 303)


ROUTES = [Route("/review", show), Route("/review", choose, methods=["POST"])]
