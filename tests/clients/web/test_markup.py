import pytest

from clients.web.markup import safe_html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain", "<p>plain</p>\n"),
        ("**bold** and `code`", "<p><strong>bold</strong> and <code>code</code></p>\n"),
        ("1. one\n2. two", "<ol>\n<li>one</li>\n<li>two</li>\n</ol>\n"),
        ("3. three", '<ol start="3">\n<li>three</li>\n</ol>\n'),
        ("```js\nlet a = '<b>'\n```", "<pre><code>let a = '&lt;b&gt;'\n</code></pre>\n"),
        ("a < b & c", "<p>a &lt; b &amp; c</p>\n"),
        ("one\ntwo", "<p>one<br>\ntwo</p>\n"),
        ("\\(x^2\\) and \\[y_1\\]", "<p>\\(x^2\\) and \\[y_1\\]</p>\n"),
        ("\\*plain\\*", "<p>*plain*</p>\n"),
        ("`\\(code\\)`", "<p><code>\\(code\\)</code></p>\n"),
        ("<b>raw</b>", "<p>&lt;b&gt;raw&lt;/b&gt;</p>\n"),
        ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>\n"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>\n"),
        ("[x](data:text/html,1)", "<p>[x](data:text/html,1)</p>\n"),
        (
            "[x](https://example.org 'title')",
            '<p><a href="https://example.org" rel="noopener noreferrer nofollow">x</a></p>\n',
        ),
        # A picture could be fetched from any host.
        (
            "![x](https://example.org/a.png)",
            '<p>!<a href="https://example.org/a.png" rel="noopener noreferrer nofollow">x</a></p>\n',
        ),
        (
            "|a|\n|:-:|\n|b|",
            "<table>\n<thead>\n<tr>\n<th>a</th>\n</tr>\n</thead>\n<tbody>\n<tr>\n<td>b</td>\n</tr>\n</tbody>\n</table>\n",
        ),
        ("", ""),
    ],
)
def test_markdown_becomes_harmless_html(text: str, html: str) -> None:
    assert safe_html(text) == html


def test_half_an_answer_is_whole_html() -> None:
    assert safe_html("- one\n- **tw") == "<ul>\n<li>one</li>\n<li>**tw</li>\n</ul>\n"
    assert safe_html("```\nhalf") == "<pre><code>half</code></pre>\n"


def test_deep_nesting_is_no_trouble() -> None:
    assert "<blockquote>" in safe_html(">" * 5000 + " deep")
    assert safe_html("[" * 5000).startswith("<p>[[[")


@pytest.mark.parametrize("target", ["#there", "/sign-out", "//evil.example/", "board", "?page=2"])
def test_a_link_to_our_own_pages_is_none(target: str) -> None:
    assert safe_html(f"[there]({target})") == '<p><a rel="noopener noreferrer nofollow">there</a></p>\n'
