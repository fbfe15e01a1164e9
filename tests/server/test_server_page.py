"""The chat page: its HTTP headers, and its behaviour in a headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from browser import PROGRAM, Browser, Tab, browser
from fake_server import FakeServer
from served import PATIENCE, program
from starlette.responses import JSONResponse, Response

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium (Debian: chromium)")

HOSTILE = """\
<script>window.harm = 1</script> and <img src=x onerror="window.harm = 1"> stay text.

[run](javascript:window.harm=1) ![see](https://example.org/x.png) [go](https://example.org/a_(b)?q=")
https://debian.org/.

```html
<script>window.harm = 1</script>
```
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def tab(chromium: Browser, fake: FakeServer) -> Iterator[Tab]:
    """The page with empty storage; fails if it has violated its content security policy."""
    opened = Tab(chromium, fake.url)
    opened.wait("model.textContent === 'fake'")
    yield opened
    assert opened.problems() == []
    opened.close()


def say(tab: Tab, text: str) -> None:
    tab.click("#input")
    tab.type(text)
    tab.press("Enter")


def wait_idle(tab: Tab) -> None:
    tab.wait("runs.size === 0 && !document.getElementById('stop').checkVisibility()")


ANSWER = ".message.assistant:last-child .text"


@needs_browser
def test_a_typed_message_streams_and_survives_a_reload(tab: Tab, fake: FakeServer) -> None:
    fake.answers("One ", "**two**", None, " three")
    assert tab.evaluate("document.activeElement.id") == "input"
    tab.type("Count,")
    tab.press("Enter", modifiers=8)
    tab.type("please")
    tab.press("Enter")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'One two'")
    assert tab.evaluate("document.querySelector('.message.assistant').ariaBusy") == "true"
    fake.go_on()
    wait_idle(tab)
    for _ in range(2):
        assert tab.text(ANSWER) == "One two three"
        assert tab.text(".message.user .text") == "Count,\nplease"
        assert tab.text("#title") == tab.text("#conversations a") == "Count,"
        assert "tokens/s · 4 tokens" in tab.text(".message.assistant .note")
        assert tab.evaluate("document.querySelector('.message strong').textContent") == "two"
        tab.reload()
    fake.answers("Four")
    say(tab, "And then?")
    wait_idle(tab)
    assert [(m["role"], m["content"]) for m in fake.bodies[1]["messages"]] == [
        ("user", "Count,\nplease"),
        ("assistant", "One **two** three"),
        ("user", "And then?"),
    ]
    tab.click("#new")
    assert tab.text("#title") == "New conversation"
    tab.evaluate("history.back()")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'Four'")


@needs_browser
def test_drafts_are_shown_where_the_server_makes_any(tab: Tab, fake: FakeServer) -> None:
    names = (
        "vllm:spec_decode_num_drafts",
        "vllm:spec_decode_num_draft_tokens",
        "vllm:spec_decode_num_accepted_tokens",
        "vllmlite:spec_decode_seconds",
        "vllmlite:spec_decode_plain_seconds",
    )
    fake.metrics = dict(zip(names, (2.0, 9.0, 1.0, 1.0, 1.0), strict=True))
    fake.answers("One", None, " two")
    say(tab, "Go")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'One'")
    fake.metrics = dict(zip(names, (12.0, 49.0, 26.0, 2.0, 3.0), strict=True))
    fake.go_on()
    wait_idle(tab)
    shown = "25 of 40 drafts accepted, 3.5 tokens a step, 2.0 × as fast"
    tab.wait(f"document.querySelector('.message.assistant .note').innerText.endsWith('{shown}')")
    fake.answers("Three")
    say(tab, "On")  # meanwhile nothing is drafted
    wait_idle(tab)
    assert "drafts" not in tab.text(".message.assistant:last-child .note")


@needs_browser
def test_stop_and_regenerate(tab: Tab, fake: FakeServer) -> None:
    fake.answers("Half", None, " whole")
    say(tab, "Go")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'Half'")
    tab.click("#stop")
    assert fake.left.wait(10)
    wait_idle(tab)
    tab.reload()
    assert tab.text(ANSWER) == "Half"
    assert tab.text(".message.assistant .note").endswith("stopped")
    fake.answers("Half", " and half", None)
    tab.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText === 'Regenerate').click()")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'Half and half'")
    assert len(fake.bodies[1]["messages"]) == 1
    tab.press("Escape")
    assert fake.left.wait(10)
    wait_idle(tab)
    fake.answers("Left", None)
    say(tab, "Once more")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'Left'")
    tab.reload()
    assert fake.left.wait(10)
    assert tab.text(ANSWER) == "Left"


@needs_browser
def test_model_output_is_never_run_as_html(tab: Tab, fake: FakeServer) -> None:
    fake.answers(*HOSTILE)
    say(tab, "<img src=x onerror='window.harm = 1'>")
    wait_idle(tab)
    shown = tab.text("#log")
    assert "<script>window.harm = 1</script> and <img src=x" in shown
    assert "[run](javascript:window.harm=1)" in shown
    assert tab.evaluate("document.querySelector('figure code').textContent") == (
        "<script>window.harm = 1</script>"
    )
    assert tab.evaluate("document.querySelectorAll('#log :is(script, img, iframe, [onerror])').length") == 0
    links = tab.evaluate("[...document.querySelectorAll('#log a')].map(a => [a.href, a.rel, a.textContent])")
    rel = "noopener noreferrer nofollow"
    assert links == [
        ["https://example.org/x.png", rel, "see"],
        ["https://example.org/a_(b)?q=%22", rel, "go"],
        ["https://debian.org/", rel, "https://debian.org/"],
    ]
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        tab.evaluate("document.body.innerHTML = '<b>no</b>'")
    assert tab.evaluate("window.harm") is None
    assert any("TrustedHTML" in problem for problem in tab.problems())


MARKDOWN = {
    "# A\n## B #\ntext": "<h2>A</h2><h3>B</h3><p>text</p>",
    "a *b* __c__ ~~d~~ ***e***": (
        "<p>a <em>b</em> <strong>c</strong> <del>d</del> <strong><em>e</em></strong></p>"
    ),
    "snake_case_name 2 * 3 * 4 \\*": "<p>snake_case_name 2 * 3 * 4 *</p>",
    "1. a\n   - b\n   - c\n2. d": '<ol start="1"><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ol>',
    "- a\n\n- b\n\nend": "<ul><li>a</li><li>b</li></ul><p>end</p>",
    "3) a\n4) b\n- c": '<ol start="3"><li>a</li><li>b</li></ol><ul><li>c</li></ul>',
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "a\nb\n\n---": "<p>a<br>b</p><hr>",
    "`` a`b `` `open": "<p><code>a`b</code> `open</p>",
    "|a|b|c|\n|-|:-:|-:|\n|1|`2\\|`|": (
        '<div class="wide" tabindex="0"><table><thead><tr><th class="start">a</th><th class="center">b</th>'
        '<th class="end">c</th></tr></thead><tbody><tr><td class="start">1</td><td class="center"><code>2|</code></td>'
        "</tr></tbody></table></div>"
    ),
    "\\(x_1 * y_2\\) $$\na*b*c$$": "<p><code>\\(x_1 * y_2\\)</code> <code>$$\na*b*c$$</code></p>",
    "a | b\n-|-|-": "<p>a | b<br>-|-|-</p>",
    "- a\n  ```\n  b\n  ```\n- c": (
        '<ul><li>a<figure><figcaption><span></span><button type="button" class="small">Copy</button></figcaption>'
        '<pre tabindex="0"><code>b</code></pre></figure></li><li>c</li></ul>'
    ),
    "[a](mailto:b@c.org) [d](data:,e)": (
        '<p><a href="mailto:b@c.org" title="mailto:b@c.org" target="_blank" rel="noopener noreferrer nofollow">a</a>'
        " [d](data:,e)</p>"
    ),
    "&lt;b&gt; <b>": "<p>&amp;lt;b&amp;gt; &lt;b&gt;</p>",
}


@needs_browser
def test_markdown(tab: Tab) -> None:
    for text, html in MARKDOWN.items():
        shown = f"(d => (showMarkdown(d, {json.dumps(text)}), d))(document.createElement('div'))"
        assert tab.evaluate(f"{shown}.innerHTML") == html


@needs_browser
def test_streamed_markdown_equals_markdown_rendered_at_once(tab: Tab) -> None:
    text = "\n\n".join([*MARKDOWN, "```py\nlong\n```", "1. a\n\n   b\n2. **c** d [e](https://f.org)"])
    tab.evaluate(f"window.whole = {json.dumps(text)}; 0")
    tab.evaluate(
        "grown = make('div'); for (let i = 0; i <= whole.length; i++) showMarkdown(grown, whole.slice(0, i)); 0"
    )
    assert tab.evaluate(
        "atOnce = make('div'); showMarkdown(atOnce, whole); atOnce.innerHTML === grown.innerHTML"
    )
    first = "d = make('div'); showMarkdown(d, '- a\\n- b'); li = d.querySelector('li');"
    kept = "showMarkdown(d, '- a\\n- bc\\n- d'); d.querySelector('li') === li && d.textContent === 'abcd'"
    assert tab.evaluate(first + kept)


@needs_browser
def test_hostile_markdown_renders_quickly(tab: Tab) -> None:
    texts = ("*a **b " * 3000, ">" * 5000, "- " * 5000, "`" * 4999, "[" * 9000, "_a __b " * 1400, "|-" * 5000,
                  "\n".join(" " * depth + "- x" for depth in range(500)), "#" * 5000, "~~a " * 2400,
             "**a " * 2490, "\\(" * 4990, "$$" * 4999,
             ">" * 10000, "> " * 10000, "|" * 100 + "\n" + "|-" * 99 + "|" + ("\n" + "|" * 100) * 100,
             "|" * 5000 + "\n" + "|-" * 4999 + "|" + "\n|x" * 5000, "a" + " " * 200000 + "b",
             "# a" + " " * 200000 + "b", "```" + " " * 200000 + "`", "~" * 200000 + "`", "~" * 200000 + "\nx",
             "a|b\n|" + " " * 200000 + "-|x")  # fmt: skip
    for text in texts:
        before = tab.cpu_seconds()
        tab.evaluate(f"(showMarkdown(document.createElement('div'), {json.dumps(text)}), 0)")
        assert tab.cpu_seconds() - before < 1.5, text[:20]
    for text in (
        "|a|b|\n|-|-|\n" + "|\n" * 130000,
        "> ---\n" * 130000,
    ):  # more children than a call has arguments
        shown = f"(d => (showMarkdown(d, {json.dumps(text)}), d))(document.createElement('div'))"
        assert tab.evaluate(f"{shown}.querySelectorAll('tr, hr').length") > 100000


@needs_browser
def test_errors_are_shown_in_words(tab: Tab, fake: FakeServer) -> None:
    fake.refusal = JSONResponse({"error": {"message": "the queue is full"}}, 429, {"retry-after": "7"})
    say(tab, "Hello")
    tab.wait("!problem.hidden")
    assert tab.text("#problem p") == "the queue is full; try again in 7 s"
    fake.refusal = JSONResponse({"error": {"message": "the queue is still full"}}, 429)
    tab.click("#retry")
    tab.wait("problem.innerText.includes('still')")
    assert tab.evaluate("document.querySelectorAll('.message').length === 1")
    assert [problem for problem in tab.problems() if "429" not in problem] == []
    fake.refusal = None
    fake.answers("Hi")
    tab.click("#retry")
    wait_idle(tab)
    assert tab.text(ANSWER) == "Hi"
    assert tab.evaluate("problem.hidden && document.querySelectorAll('.assistant').length === 1")
    fake.refusal = Response(
        'data: {"error": {"message": "a step failed"}}\n\n', media_type="text/event-stream"
    )
    say(tab, "Again")
    tab.wait("!problem.hidden")
    assert tab.text("#problem p") == "a step failed"
    fake.refusal = None
    fake.answers("Half", None)
    tab.click("#retry")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'Half'")
    fake.break_off()
    tab.wait("!problem.hidden")
    assert tab.text("#problem p") == "The connection broke off before the answer's end."
    tab.call("Network.enable")
    tab.call(
        "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
    )
    tab.click("#retry")
    tab.wait("problem.innerText.includes('does not answer')")
    assert tab.text(ANSWER) == "Half"
    assert tab.evaluate("document.getElementById('toast').hidden")
    known = ("ERR_INTERNET_DISCONNECTED", "ERR_INCOMPLETE_CHUNKED_ENCODING")
    assert all(any(name in problem for name in known) for problem in tab.problems())


@needs_browser
def test_a_key_is_asked_for(chromium: Browser, fake: FakeServer) -> None:
    fake.key = "sesame"
    tab = Tab(chromium, fake.url)
    for key in ("wrong", "sesame"):
        tab.wait("document.activeElement.name === 'key' && document.activeElement.value === ''")
        assert tab.evaluate("refused.hidden") is (key == "wrong")
        tab.type(key)
        tab.press("Enter")
    tab.wait("model.textContent === 'fake'")
    fake.answers("Hi")
    say(tab, "Hello")
    wait_idle(tab)
    assert tab.text(ANSWER) == "Hi"
    assert "sesame" not in tab.evaluate("JSON.stringify(localStorage)")
    tab.close()


@needs_browser
def test_conversations_are_renamed_deleted_and_edited(tab: Tab, fake: FakeServer) -> None:
    fake.answers("A")
    for text in ("first", "second"):
        tab.click("#new")
        say(tab, text)
        wait_idle(tab)
    titles = "[...document.querySelectorAll('#conversations a')].map(a => a.textContent)"
    assert tab.evaluate(titles) == ["second", "first"]
    tab.click("#conversations li:first-child")
    tab.click("#conversations li:first-child [data-do=rename]")
    tab.type("renamed")
    tab.press("Enter")
    assert tab.evaluate(titles) == ["renamed", "first"]
    tab.click("#conversations li:last-child [data-do=delete]")
    assert tab.evaluate(titles) == ["renamed"]
    tab.click("#undo")
    assert tab.evaluate(titles) == ["renamed", "first"]
    tab.click("#conversations li:first-child [data-do=delete]")
    tab.reload()
    assert tab.evaluate(titles) == ["first"]
    other = {"title": "of another tab", "updated": 1, "messages": []}
    tab.evaluate(f"localStorage.setItem('vllmlite.chat.x', {json.dumps(json.dumps(other))})")
    tab.evaluate("dispatchEvent(new StorageEvent('storage', {key: 'vllmlite.chat.x'}))")
    assert tab.evaluate(titles) == ["first", "of another tab"]
    tab.evaluate("localStorage.removeItem('vllmlite.chat.x')")
    tab.evaluate("dispatchEvent(new StorageEvent('storage', {key: 'vllmlite.chat.x'}))")
    assert tab.evaluate(titles) == ["first"]
    tab.click("#conversations li:first-child a")
    tab.wait("title.textContent === 'first'")
    tab.click("#input")
    tab.press("ArrowUp")
    tab.type(" again")
    tab.press("Enter")
    wait_idle(tab)
    assert [m["content"] for m in fake.bodies[-1]["messages"]] == ["first again"]
    assert tab.evaluate("document.querySelectorAll('.message').length") == 2


@needs_browser
def test_an_earlier_message_is_edited_and_restored(tab: Tab, fake: FakeServer) -> None:
    fake.answers("A")
    for text in ("first", "second"):
        say(tab, text)
        wait_idle(tab)
    tab.evaluate("[...document.querySelectorAll('.user button')].find(b => b.innerText === 'Edit').click()")
    assert tab.evaluate("document.activeElement.value") == "first"
    tab.press("Escape")
    assert tab.evaluate("input.value") == ""
    tab.evaluate("[...document.querySelectorAll('.user button')].find(b => b.innerText === 'Edit').click()")
    tab.type(" again")
    tab.press("Enter")
    wait_idle(tab)
    contents = "shown.messages.map(m => m.content)"
    assert tab.evaluate(contents) == ["first again", "A"]
    tab.click("#undo")
    assert tab.evaluate(contents) == ["first", "A", "second", "A"]
    fake.answers("B", None)
    tab.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText === 'Regenerate').click()")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'B'")
    tab.click("#undo")
    assert fake.left.wait(10)
    wait_idle(tab)
    fake.answers(None)
    tab.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText === 'Regenerate').click()")
    tab.wait("!document.getElementById('stop').hidden")
    tab.press("Escape")  # before a token: the earlier answer stays
    wait_idle(tab)
    tab.reload()
    assert tab.evaluate(contents) == ["first", "A", "second", "A"]
    assert tab.text(ANSWER) == "A"


@needs_browser
def test_the_page_scrolls_to_the_end_until_the_user_scrolls_away(tab: Tab, fake: FakeServer) -> None:
    lines = [f"line {number}\n\n" for number in range(60)]
    fake.answers("```\n" + "long " * 60 + "\n", *["x\n"] * 40, None, "```\n", *lines, None, *lines)
    say(tab, "Go")
    gap = "scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"
    tab.wait("document.querySelector('pre')?.innerText.split('x').length === 41")
    tab.wait(f"{gap} < 2 && scroller.scrollTop > 100")
    tab.evaluate("document.querySelector('pre').scrollLeft = 30")
    tab.evaluate("scroller.scrollTop -= 10")
    tab.wait("!down.hidden")
    top = tab.evaluate("scroller.scrollTop")
    fake.go_on()
    tab.wait("document.querySelectorAll('.assistant p').length === 60")
    assert tab.evaluate("scroller.scrollTop") == top
    assert tab.evaluate("document.querySelector('pre').scrollLeft") == 30
    tab.click("#down")
    fake.go_on()
    wait_idle(tab)
    assert tab.evaluate(gap) < 2
    assert tab.evaluate("document.querySelector('pre').scrollLeft") == 30


@needs_browser
def test_reasoning_stays_open_when_the_answer_ends(tab: Tab, fake: FakeServer) -> None:
    fake.reasoning = "Let me see."
    fake.answers("A", None, "B")
    say(tab, "Go")
    tab.wait(f"document.querySelector('{ANSWER}')?.innerText === 'A'")
    assert not tab.evaluate("document.querySelector('details').open")
    tab.click("summary")
    fake.go_on()
    wait_idle(tab)
    assert tab.text("details div") == "Let me see."
    assert tab.text(ANSWER) == "AB"


@needs_browser
def test_enter_of_an_input_method_does_not_send(tab: Tab, fake: FakeServer) -> None:
    fake.answers("A")
    tab.call("Input.imeSetComposition", text="にほん", selectionStart=3, selectionEnd=3)
    for kind in ("keydown", "keyup"):
        tab.evaluate(
            f"input.dispatchEvent(new KeyboardEvent('{kind}', {{key: 'Enter', keyCode: 229, bubbles: true}}))"
        )
    tab.type("日本")
    assert tab.evaluate("[input.value, shown]") == ["日本", None]
    tab.press("Enter")
    wait_idle(tab)
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "日本"}]


def pick(tab: Tab, file: Path, content: str, says: str) -> None:
    """Import ``content`` as a file, and return the page's message."""
    file.write_text(content)
    tab.evaluate("(undo.previousElementSibling.textContent = '').length")
    tab.click("#open-settings")
    node = tab.call(
        "DOM.querySelector", nodeId=tab.call("DOM.getDocument")["root"]["nodeId"], selector="#file"
    )
    tab.call("DOM.setFileInputFiles", files=[str(file)], **node)
    tab.wait(f"undo.previousElementSibling.textContent.includes({json.dumps(says)})")


@needs_browser
def test_conversations_are_exported_and_imported(tab: Tab, fake: FakeServer, tmp_path: Path) -> None:
    fake.answers("A")
    say(tab, "first")
    wait_idle(tab)
    tab.call(
        "Browser.setDownloadBehavior",
        behavior="allow",
        downloadPath=str(tmp_path),
        browserContextId=tab.context,
    )
    tab.click("#open-settings")
    tab.click("#export")
    file = tmp_path / "conversations.json"
    tab.wait_for(file.is_file)
    tab.press("Escape")
    tab.click("#conversations li:first-child")
    tab.click("[data-do=delete]")
    exported = file.read_text()
    (kept,) = json.loads(exported)
    strange = (
        {"title": 1},
        {**kept, "id": ["x"]},
        {**kept, "messages": [{**kept["messages"][0], "rate": "x"}]},
    )
    fill_up = (
        "keeps = Storage.prototype.setItem, Storage.prototype.setItem = () => { throw new Error('full') }"
    )
    tab.evaluate(f"[{fill_up}].length")
    pick(tab, file, exported, "storage is full")
    tab.evaluate("[Storage.prototype.setItem = keeps].length")
    pick(tab, file, json.dumps([{**kept, "updated": kept["updated"] + 1}]), "Imported 1 of 1")
    pick(tab, file, exported, "Imported 0 of 1")
    for value in strange:
        pick(tab, file, json.dumps([value]), "not what Export writes")
    assert tab.evaluate("Object.keys(settings).length") == 0
    tab.reload()
    tab.click("#conversations a")
    tab.wait("title.textContent === 'first'")
    assert tab.text(ANSWER) == "A"


@needs_browser
def test_settings_are_sent_and_kept(tab: Tab, fake: FakeServer) -> None:
    tab.click("#open-settings")
    for name, value in {"system": "Be brief.", "top_p": "7", "temperature": "0", "top_k": "5"}.items():
        tab.click(f"[name={name}]")
        tab.type(value)
    tab.click("[value=dark]")
    tab.press("Escape")
    tab.reload()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    fake.answers("Yes")
    say(tab, "Hello")
    wait_idle(tab)
    body = fake.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_k"]) == (0, 5)
    assert body.keys().isdisjoint(["seed", "top_p"])  # 7 is out of its range


@needs_browser
def test_on_a_phone_the_list_is_a_drawer(chromium: Browser, fake: FakeServer) -> None:
    tab = Tab(chromium, fake.url, width=390, height=844)
    fake.answers("A")
    say(tab, "Hello\nthere")
    assert tab.evaluate("document.getElementById('input').value.trim()") != ""  # Enter is a new line here
    tab.click("#send")
    wait_idle(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert not tab.evaluate("document.getElementById('side').checkVisibility({visibilityProperty: true})")
    tab.click("#menu")
    tab.wait("document.getElementById('side').getBoundingClientRect().x === 0")
    small = (
        "[...document.querySelectorAll('button, a, select, input, textarea, summary')]"
        ".filter(e => (b => e.checkVisibility() && Math.min(b.width, b.height) < 44)(e.getBoundingClientRect()))"
        ".map(e => e.outerHTML)"
    )
    assert tab.evaluate(small) == []
    tab.click("#new")
    tab.wait("!document.getElementById('side').checkVisibility({visibilityProperty: true})")
    assert tab.text("#title") == "New conversation"
    tab.click("#open-settings")
    assert tab.evaluate(small.replace("input,", "input:not([type=radio]),")) == []
    tab.close()


def test_the_page_needs_no_key_and_can_be_turned_off(chromium_or_none: Browser | None) -> None:
    with program("--api-key", "sesame") as running:
        page = httpx.get(running.url, timeout=PATIENCE)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert policy["script-src"].startswith("'sha256-")
        known = {"if-none-match": page.headers["etag"]}
        assert httpx.get(running.url, headers=known, timeout=PATIENCE).status_code == 304
        assert httpx.post(running.url, timeout=PATIENCE).status_code == 405
        if chromium_or_none is not None:
            tab = Tab(chromium_or_none, running.url)
            tab.wait("document.activeElement.name === 'key'")
            tab.type("sesame")
            tab.press("Enter")
            tab.wait("model.textContent !== ''")
            say(tab, "What is dpkg?")
            tab.wait("document.querySelector('.message.assistant .note')?.innerText.includes('tokens/s')")
            wait_idle(tab)
            tab.close()
    with program("--no-ui") as running:
        answer = httpx.get(running.url, timeout=PATIENCE)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "GET /: Not Found"


@pytest.fixture
def chromium_or_none(request: pytest.FixtureRequest) -> Browser | None:
    found: Browser | None = request.getfixturevalue("chromium") if PROGRAM else None
    return found
