"""/docs: Swagger UI from files on this machine, since a GPU box is often offline; and the OpenAPI document."""

from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from sftd_server.errors import ERROR_MEANINGS, NotFound, is_openai

_STATIC = Path(fastapi_offline.__file__).parent / "static"
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_CSP = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>sftd API</title>
<link rel="stylesheet" href="docs/static/swagger-ui.css">
<link rel="icon" href="docs/static/favicon.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/static/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# The address is made whole because fetch refuses a relative one where the page was opened as http://name:key@host.
_START = """SwaggerUIBundle({
  url: location.origin + location.pathname.replace(/docs$/, "openapi.json"),
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: true,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
});
"""
_DESCRIPTION = """Fine-tuning on your own GPU box. Post a job, watch it, fetch what it made.

Every call but `/healthz` needs a key: press **Authorize** and paste it. Every error has one shape,
`{"error": {"message", "type", "param", "code"}}`, and every answer an `x-request-id`."""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def page() -> HTMLResponse:
    """The documentation page."""
    return HTMLResponse(_PAGE, headers={"content-security-policy": _CSP})


@router.get("/docs/start.js")
async def start() -> Response:
    """What the page runs; apart, so that no inline script is needed."""
    return Response(_START, media_type="text/javascript")


@router.get("/docs/static/{name}")
async def asset(name: str) -> FileResponse:
    """Swagger UI's own files."""
    if name not in _ASSETS:
        raise NotFound(f"There is no {name[:80]!r} here.", code="unknown_route")
    return FileResponse(_STATIC / name, media_type=_ASSETS[name])


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    return JSONResponse(request.app.openapi())


def describe(app: FastAPI) -> None:
    """Give the app an OpenAPI document with a working Authorize."""
    make_schema = _cached(app)
    app.openapi = make_schema  # type: ignore[method-assign]  # the way FastAPI documents for this


def _add_common_errors(operation: dict[str, Any]) -> None:
    """What the gate and the framework may answer on any route; without a key and a body there is less of it."""
    statuses = [400, 403] if operation.get("security") == [] else [400, 401, 403, 422, 429, 503, 507]
    if "requestBody" in operation:
        statuses += [408, 413, 415]
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    for status in statuses:
        answer = {"description": ERROR_MEANINGS[status], "content": content}
        operation["responses"].setdefault(str(status), answer)


def _cached(app: FastAPI) -> Any:  # the type of FastAPI.openapi
    def make() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title="sftd", version=app.version, description=_DESCRIPTION, routes=app.routes
            )
            schema["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "An access key."}
            }
            schema["security"] = [{"key": []}]
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    _add_common_errors(operation)
                    if is_openai(path):  # there a malformed request is a 400
                        operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    return make
