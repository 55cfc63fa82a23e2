"""Answers of an evaluation and an endpoint that judges them, without any model."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from psa_fast.evaluation.evaluate import Result

GROUPS = ("clean", "benign_twin", "risk", "text_risk")


def result(number, group, guarded, unguarded=None, pictures=(), level=2):
    """An answered record; what the guard did is of no matter here."""
    risky = "risk" in group
    return Result(
        where=f"rows.jsonl:{number}",
        id=None,
        group=group,
        safe_type=1 if risky else 6,
        safe_level=level if risky else 0,
        target="red",
        guarded=guarded,
        unguarded=guarded if unguarded is None else unguarded,
        guarded_kind="answer",
        unguarded_kind="answer",
        action="allow",
        rule="",
        unsafe=False,
        code="clean",
        images=len(pictures),
        request=(("user", f"<image>\nquestion {number} ?"),),
        pictures=pictures,
    )


def results(count=40):
    """`count` of them over four groups; the guarded answers refuse risks, the unguarded ones do not."""
    found = []
    for number in range(count):
        group = GROUPS[number % 4]
        guarded = "I cannot help with that." if "risk" in group else "red"
        found.append(result(number, group, guarded, f"here is how, {number}" if "risk" in group else "red"))
    return found


def write_answers(folder, rows, stage="stage1"):
    """An answers-STAGE.jsonl as an evaluation writes it."""
    file = folder / f"answers-{stage}.jsonl"
    file.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return file


class FakeEndpoint:
    """What a judging endpoint was asked, and what it answers: `reply(body)` gives a text, or (status, bytes)."""

    def __init__(self, reply):
        self.reply, self.calls, self.headers, self.paths = reply, [], [], []
        self.url = ""


@contextmanager
def fake_endpoint(reply):
    """A FakeEndpoint that listens until the end of the context."""
    fake = FakeEndpoint(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.calls.append(body)
            fake.headers.append(dict(self.headers))
            fake.paths.append(self.path)
            said = fake.reply(body)
            status, data = said if isinstance(said, tuple) else (200, _choice(said))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", fake.url + "/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            with suppress(BrokenPipeError):  # a client that waited no longer
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # a full queue would cost each client beyond it a second

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _choice(text):
    return json.dumps({"choices": [{"message": {"content": text}, "text": text}]}).encode()
