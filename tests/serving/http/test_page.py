"""The page at `/`: what it may load, what it says, and how it behaves in a browser."""

import json
import queue
import re
import subprocess

import httpx
import pytest
from browser import command, needs_browser
from running_server import serving
from starlette.responses import HTMLResponse
from starlette.routing import Route

from tpu_stack.serving.http.limits import Limits

EVIL = "<img src=x onerror=\"document.title='owned'\"> <b>bold</b> "
PROBE = """<!doctype html>
<iframe id="page" style="border:0;width:WIDTHpx;height:2400px" src="/"></iframe>
<script>
const wait = ms => new Promise(done => setTimeout(done, ms));
addEventListener("load", async () => {
  const view = document.getElementById("page").contentWindow, page = view.document;
  const get = id => page.getElementById(id), said = id => get(id).textContent;
  const until = async holds => { for (let i = 0; i < 400 && !holds(); i++) await wait(20); };
  const found = {width: view.innerWidth, scroll: page.documentElement.scrollWidth};
  found.wide = [...page.body.querySelectorAll("*")]
    .filter(e => e.getBoundingClientRect().right > view.innerWidth + 1).map(e => e.tagName);
  found.unlabelled = [...page.querySelectorAll("input, textarea, select")]
    .filter(e => !e.labels.length).map(e => e.id);
  page.querySelector("input[value=completion]").click();
  get("prompt").value = EVIL_TEXT; get("temperature").value = 0; get("max_tokens").value = 40;
  get("prompt").dispatchEvent(new view.KeyboardEvent(
    "keydown", {key: "Enter", ctrlKey: true, bubbles: true, cancelable: true}));
  await until(() => said("state") === "done");
  found.answer = said("answer"); found.elements = get("answer").children.length;
  found.ttft = said("ttft"); found.rate = said("rate"); found.count = said("count");
  found.finish = said("finish"); found.title = page.title;
  get("max_tokens").value = 999999; get("form").noValidate = true; get("send").click();
  await until(() => said("state") === "failed");
  found.error = said("error"); found.shown = !get("error").hidden;
  page.querySelector("input[value=chat]").click();
  found.system = !get("system-row").hidden; found.label = get("prompt-label").firstChild.data;
  get("prompt").value = "long"; get("max_tokens").value = 2000; get("send").click();
  await until(() => said("answer").length > 5);
  found.stoppable = !get("halt").disabled; get("halt").click();
  await until(() => said("state") === "stopped");
  found.stopped = said("state"); found.again = !get("send").disabled;
  await until(() => page.body.dataset.polls >= 3);
  found.paths = [...page.querySelectorAll(".charts section > svg path")]
    .filter(path => path.getAttribute("d")).length;
  found.pages = said("page-legend"); found.running = said("n-running");
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
});
</script>
"""


def test_only_its_own_script_and_style_may_run(shared):
    first, second = (httpx.get(f"{shared.url}/") for _ in range(2))
    policy = first.headers["content-security-policy"]
    (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
    assert nonce not in second.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert first.text.count(f'nonce="{nonce}"') == 2
    assert re.findall(r"<(script|style)\b(?! nonce)", first.text) == []
    assert not re.search(r"\son\w+=|\sstyle=|innerHTML|document\.write", first.text)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", first.text)
    assert first.headers["x-content-type-options"] == "nosniff"


def test_a_model_called_badly_stays_text(tokenizer):
    with serving(tokenizer) as running:
        object.__setattr__(running.host.model, "id", "</script><script>alert(1)</script>")
        text = httpx.get(f"{running.url}/").text
    assert text.count("</script>") == 1


def test_it_asks_for_a_key_where_one_is_needed(tokenizer, shared):
    assert 'id="key"' not in httpx.get(f"{shared.url}/").text
    with serving(tokenizer, keys=frozenset({"secret"})) as running:
        text = httpx.get(f"{running.url}/").text
        assert 'id="key" type="password"' in text
        assert "secret" not in text


@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(tokenizer, tmp_path, width):
    probe = PROBE.replace("WIDTH", str(width)).replace("EVIL_TEXT", json.dumps(EVIL))
    probe = probe.replace("</b>", "<\\/b>")

    results: queue.Queue[dict] = queue.Queue()

    async def wrapper(request):
        return HTMLResponse(probe)

    async def take(request):
        results.put(json.loads(await request.body()))
        return HTMLResponse("")

    options = {"step_s": 0.004, "max_length": 4096, "limits": Limits(output_tokens=4000)}
    with serving(tokenizer, **options) as running, (tmp_path / "log").open("w") as log:
        running.host_app.router.routes += [
            Route("/probe", wrapper),
            Route("/found", take, methods=["POST"]),
        ]
        asked = [*command(tmp_path / "profile"), "--remote-debugging-port=0"]
        browser = subprocess.Popen([*asked, f"{running.url}/probe"], stdout=log, stderr=log)
        try:
            found = results.get(timeout=60)
        finally:
            browser.terminate()
            browser.wait(timeout=20)
    said = (tmp_path / "log").read_text(errors="replace").splitlines()
    problems = [line for line in said if "CONSOLE" in line and "status of 400" not in line]
    assert not problems
    assert (found["width"], found["wide"], found["unlabelled"]) == (width, [], [])
    assert found["scroll"] <= width
    whole = tokenizer.encode(EVIL)
    assert found["answer"] == tokenizer.decode([whole[at % len(whole)] for at in range(40)])
    assert (found["elements"], found["title"]) == (0, "fake on tpu-stack")
    assert re.fullmatch(r"[\d.]+ m?s", found["ttft"])
    assert re.fullmatch(r"[\d,.]+ tokens/s", found["rate"])
    assert (found["count"], found["finish"]) == (f"{len(whole)} in, 40 out", "length")
    assert found["shown"]
    assert "maximum context length" in found["error"]
    assert (found["system"], found["label"].strip()) == (True, "Your message")
    assert (found["stoppable"], found["stopped"], found["again"]) == (True, "stopped", True)
    assert found["paths"] >= 4
    assert found["pages"].startswith("used 0")
    assert found["running"].endswith("of 8 slots")
