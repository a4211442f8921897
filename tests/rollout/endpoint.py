"""A small server that speaks as OpenAI-compatible ones do, with faults."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPLY = "<switch>SWITCH</switch><subgoal>look</subgoal><action>look</action>"


class Endpoint:
    """`tokens`: it takes and gives token ids, as vLLM does; else it has chat/completions alone, as many do."""

    def __init__(self, tokenizer, *, tokens=True, served=("served",), key=None):
        self.tokenizer, self.tokens, self.served, self.key = tokenizer, tokens, served, key
        self.reply = lambda content: REPLY
        self.faults = []  # of the next posts that ask for more than one token
        self.posts = []  # (path, content) of all of them
        self.keys = set()  # that were sent
        self.url = ""

    def list_models(self):
        return {"data": [{"id": name} for name in self.served]}

    def write(self, path, content):
        """(status, what is answered)"""
        if content["model"] not in self.served:
            return 404, {"error": {"message": f"The model `{content['model']}` does not exist."}}
        text = self.reply(content)
        if path.endswith("/chat/completions"):
            message = {"role": "assistant", "content": text}
            return 200, {"choices": [{"message": message, "finish_reason": "stop"}]}
        if not self.tokens:
            return 404, {"detail": "Not Found"}
        prompt, ids = content["prompt"], self.encode(text) + [self.tokenizer.eos_token_id]
        choice = {"text": text, "finish_reason": "stop"}
        if content.get("return_token_ids"):
            prompt = self.encode(prompt) if isinstance(prompt, str) else prompt
            choice |= {"prompt_token_ids": prompt, "token_ids": ids[: content["max_tokens"]]}
        return 200, {"choices": [choice]}

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def answered(self):
        """What was posted but for what is asked at the start."""
        return [(path, content) for path, content in self.posts if content["max_tokens"] > 1]


@contextmanager
def serve(endpoint):
    """`endpoint`, at its `url` meanwhile."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(endpoint))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def make_handler(endpoint):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(*(200, endpoint.list_models()) if self.is_known() else refuse())

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.posts.append((self.path, content))
            if not self.is_known():
                return self.answer(*refuse())
            if content["max_tokens"] > 1 and endpoint.faults:
                return self.fail(endpoint.faults.pop(0), content)
            self.answer(*endpoint.write(self.path, content))

        def is_known(self):
            key = self.headers.get("Authorization")
            endpoint.keys.add(key)
            return endpoint.key is None or key == f"Bearer {endpoint.key}"

        def fail(self, fault, content):
            if isinstance(fault, int):
                return self.answer(fault, {"error": {"message": "out of order"}})
            if fault == "hang":
                return time.sleep(5)
            if fault == "lost":
                return self.connection.close()
            self.answer(200, fault)

        def answer(self, status, content):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


def refuse():
    return 401, {"error": "Unauthorized"}
