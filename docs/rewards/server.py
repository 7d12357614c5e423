"""A server that scores pictures: [reward.http] of alignprop (docs/rewards.md). Standard library and Pillow alone.

    python docs/rewards/server.py 8000      # server.url = "http://127.0.0.1:8000/"

Put your own model into `scores`.
"""
import base64, io, json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from PIL import Image, ImageStat


def scores(images, prompts, fields):
    """One score for each picture (PIL, RGB), higher is better: here how bright it is, from 0 to 1."""
    return [sum(ImageStat.Stat(image).mean) / 3 / 255 for image in images]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in question["images"]]
            status, answer = 200, {"scores": scores(images, question["prompts"], question["fields"])}
        except Exception as error:  # 400 ends the run; 503 would be asked again
            status, answer = 400, {"error": repr(error)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
