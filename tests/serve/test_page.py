"""The page in a headless browser, driven by a frame of its own origin; without a browser, its text and headers."""

import html
import json
import re
import threading
import time

import pytest
from builders.browser import dumped
from builders.http_requests import QUESTION, data_url, png
from builders.tiny import free_port

from psa_fast.safety import Request
from psa_fast.safety.explanation import explain

DRIVER = """<!doctype html><body><iframe src="/" style="width:%dpx;height:900px"></iframe><script>
const wait = async (done) => { while (!done()) await new Promise((next) => setTimeout(next, 20)); };
onload = async () => {
  const page = document.querySelector("iframe").contentWindow, doc = page.document, by = (id) => doc.getElementById(id);
  const bytes = Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0));
  const given = new page.DataTransfer();
  given.items.add(new page.File([bytes], "a.png", { type: "image/png" }));
  by("drop").dispatchEvent(new page.DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
  await wait(() => doc.querySelector("#drop img")?.complete);
  by("question").value = "%s";
  by("key").value = "%s";
  if (!by("offer").hidden) by("explain").click();
  by("ask").click();
  await wait(() => !by("result").hidden);
  const looks = doc.querySelector("#looks img");
  if (looks) await wait(() => looks.complete);
  const out = document.createElement("pre");
  const wide = doc.documentElement.scrollWidth > doc.documentElement.clientWidth;
  out.textContent = JSON.stringify({ answer: by("answer").textContent, kind: by("answer").className, wide,
    why: by("why").textContent, looks: looks ? looks.naturalWidth : 0,
    verdict: by("verdict").textContent, scores: [...doc.querySelectorAll("#scores tr")].map((r) => r.textContent) });
  document.body.append(out);
};
</script></body>"""


@pytest.fixture
def address(guard):
    """A served page, and beside it whatever driver a test puts into `pages`."""
    pytest.importorskip("fastapi", reason="the extra psa-fast[serve] is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra psa-fast[serve] is not installed")
    from fastapi.responses import HTMLResponse

    from psa_fast.serve.api_keys import ApiKeys
    from psa_fast.serve.http_app import Server
    from psa_fast.serve.settings import ServerSettings

    settings = ServerSettings(model_name='a"<b>', max_new_tokens=6)
    server = Server(guard, settings, ApiKeys(["a-key-of-some-length"]), page=True, explains=True)
    pages = {}

    @server.app.get("/driver/{name}")
    async def driver(name: str):
        return HTMLResponse(pages[name])

    port = free_port()
    runner = uvicorn.Server(uvicorn.Config(server.app, port=int(port), log_config=None))
    thread = threading.Thread(target=runner.run)
    thread.start()
    while not runner.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}", pages
    runner.should_exit = True
    thread.join(30)


@pytest.mark.parametrize(("key", "width"), [("a-key-of-some-length", 1200), ("a-key-of-some-length", 360), ("no", 360)])
def test_a_picture_is_dropped_and_asked_about(guard, address, tmp_path, key, width):
    url, pages = address
    pages["drive"] = DRIVER % (width, data_url(png(2)).partition(",")[2], QUESTION, key)
    dom = dumped(f"{url}/driver/drive", tmp_path, "--virtual-time-budget=20000").stdout
    (found,) = re.findall("<pre>(.*)</pre>", dom, re.DOTALL)
    seen = json.loads(html.unescape(found))
    assert not seen["wide"]
    if key == "no":
        assert seen["kind"] == "error"
        assert "API key" in seen["answer"]
        assert (seen["why"], seen["looks"]) == ("", 0)
        return
    (expected,) = guard.answer([Request(f"<image>\n{QUESTION}", (png(2),))], max_new_tokens=6)
    verdict = expected.verdict
    assert seen["answer"] == expected.text
    assert seen["kind"] == verdict.action
    assert seen["verdict"].startswith(f"{verdict.action} ({verdict.rule})")
    assert seen["why"].splitlines() == explain(guard, Request(f"<image>\n{QUESTION}", (png(2),))).lines()
    assert seen["looks"] >= 640, "the picture of it was not drawn"
    assert seen["scores"] == [f"{name}{value:.3f}" for name, value in verdict.type_probs.items()]


def test_the_page_loads_nothing_from_elsewhere(guard, open_client):
    client = open_client(guard, page=True, model_name='a"<b>')
    page, script = client.get("/"), client.get("/page.js")
    assert 'data-model="a&quot;&lt;b&gt;"' in page.text
    for reply in (page, script):
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "://" not in reply.text
        assert "innerHTML" not in reply.text
    assert open_client(guard).get("/").status_code == 404
