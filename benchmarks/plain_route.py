"""What ``benchmarks service`` compares with: a route of plain FastAPI and SQLAlchemy that lists jobs, served by uvicorn."""

import socket
from argparse import ArgumentParser

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import create_engine, text


class Job(BaseModel):
    """A job in the list: what the service's list has, too."""

    id: str
    name: str
    tenant: str
    status: str
    model: str
    submitted_at: str
    started_at: str | None
    finished_at: str | None
    accuracy: float | None
    labels: dict[str, str]
    priority: int


class Page(BaseModel):
    """The newest jobs."""

    jobs: list[Job]


def plain(database: str) -> FastAPI:
    """The application."""
    app, engine = FastAPI(), create_engine(database)
    query = text(
        "select id, name, tenant, status, model, submitted_at, started_at, finished_at, priority, "
        "json_extract(result, '$.accuracy') as accuracy from jobs where deleted_at is null order by number desc limit :limit"
    )

    @app.get("/v1/jobs")
    def jobs(limit: int = 50) -> Page:
        with engine.connect() as connection:
            rows = connection.execute(query, {"limit": limit}).mappings()
            return Page(jobs=[Job(**row, labels={}) for row in rows])

    return app


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("database")
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", options.port))
    print("ready", flush=True)
    uvicorn.Server(uvicorn.Config(plain(options.database), log_level="error")).run(sockets=[listener])
