"""Recent requests of a token, for the pages."""

from __future__ import annotations

from typing import Any

from mtlsign.service.database import Database

_RECENT = "SELECT id,created,finished,count FROM jobs WHERE token=? ORDER BY created DESC, id LIMIT ?"
_RESULTS = (
    "SELECT coalesce(json_extract(outcome,'$.verdict.status'),'problem'), count(*) "
    "FROM results WHERE job=? GROUP BY 1 ORDER BY 1"
)
_MODELS = (
    "SELECT DISTINCT json_extract(outcome,'$.verdict.model_digest') FROM results "
    "WHERE job=? AND json_extract(outcome,'$.verdict.model_digest') IS NOT NULL LIMIT ?"
)
#: Models of one request that the page names.
_MAX_MODELS = 3


def recent_requests(database: Database, token: str, count: int = 20) -> list[dict[str, Any]]:
    """Return the newest requests of a token: id, time, number of claims, results by status, and models.

    Args:
        database: database of the service.
        token: id of the token.
        count: largest number of requests.
    """
    return [
        {
            "id": name, "created": created, "finished": finished is not None, "claims": claims,
            "results": dict(database.fetch_all(_RESULTS, name)),
            "models": [digest for (digest,) in database.fetch_all(_MODELS, name, _MAX_MODELS)],
        }
        for name, created, finished, claims in database.fetch_all(_RECENT, token, count)
    ]  # fmt: skip
