"""Model output as HTML: Markdown is rendered, and the result is sanitised."""

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, escape
from markupsafe import Markup

# The delimiters that models put around formulas. Markdown would treat their backslashes as escapes and drop them.
MATH = (r"\(", r"\)", r"\[", r"\]")


def escape_but_math(state: StateInline, silent: bool) -> bool:
    """Markdown's rule for backslash escapes, except those in MATH."""
    return state.src[state.pos : state.pos + 2] not in MATH and escape(state, silent)


# No images, since browsers would fetch them from any host. Line ends become line breaks, as users and models mean them.
MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")
MARKDOWN.inline.ruler.at("escape", escape_but_math)
TAGS = {"a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre"} | {
    *("s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul")
}
ATTRIBUTES: dict[str, set[str]] = {"a": {"href"}, "ol": {"start"}, "*": set()}
SCHEMES = {"http", "https", "mailto"}


def safe_html(text: str) -> Markup:
    """Untrusted Markdown as HTML that can neither run scripts nor fetch anything."""
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
    # A relative link would lead within this page, which no model knows, and following it would discard unsent text.
    return value if name != "href" or value.partition(":")[0].lower() in SCHEMES else None
