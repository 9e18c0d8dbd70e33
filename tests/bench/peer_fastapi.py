"""FastAPI on uvicorn with uvloop and httptools."""
from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field

import peer_store


class Sms(BaseModel):
    """The body of a POST."""

    PhoneNumber: str = Field(pattern="^[0-9]+$")
    Content: str = Field(min_length=1)


app = FastAPI()


@app.post("/sms", status_code=202)
async def post(sms: Sms) -> dict[str, str]:
    """Accepts a message."""
    return {"ID": peer_store.accept()}


@app.get("/sms/{message_id}")
async def get(message_id: str) -> dict[str, str]:
    """Tells a status."""
    return {"Status": peer_store.statuses.get(message_id, "NOT_FOUND")}


port = int(sys.argv[1])
uvicorn.run(app, port=port, loop="uvloop", http="httptools", access_log=False, log_level="error", backlog=2048)
