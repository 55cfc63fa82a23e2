"""What a client of the HTTP server sends."""

import base64
import io

from builders.tiny_llava import picture

QUESTION = "what colour is the circle ?"


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def user(text=QUESTION, *images):
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def chat(*messages, **options):
    return {"model": "psa", "messages": list(messages), "max_tokens": 6} | options
