"""Model output as HTML: Markdown is rendered, and what comes out is sanitised before anybody sees it."""

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, escape
from markupsafe import Markup

# What models put around formulas: to Markdown the backslash of each would be an escape, and vanish.
MATH = (r"\(", r"\)", r"\[", r"\]")


def escape_but_math(state: StateInline, silent: bool) -> bool:
    """Markdown's rule for backslashes, less those of MATH."""
    return state.src[state.pos : state.pos + 2] not in MATH and escape(state, silent)


# No images: they would be fetched from wherever the text says. People and models end lines where they mean it.
MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")
MARKDOWN.inline.ruler.at("escape", escape_but_math)
TAGS = {"a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre"} | {
    *("s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul")
}
ATTRIBUTES: dict[str, set[str]] = {"a": {"href"}, "ol": {"start"}, "*": set()}
SCHEMES = {"http", "https", "mailto"}


def safe_html(text: str) -> Markup:
    """`text`, Markdown of whatever origin, as HTML that can neither run nor fetch anything."""
    html = nh3.clean(
        MARKDOWN.render(text),
        tags=TAGS,
        attributes=ATTRIBUTES,
        attribute_filter=_away,
        url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow",
        strip_comments=True,
    )
    return Markup(html)


def _away(tag: str, name: str, value: str) -> str | None:
    # A path or a fragment would be one of this page's own, which no model has seen; following it loses what one writes.
    return value if name != "href" or value.partition(":")[0].lower() in SCHEMES else None
