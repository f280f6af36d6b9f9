"""/openapi.json, from the same table that routes requests."""

import re
from collections.abc import Sequence
from typing import Any

from halve.server.http import Endpoint


def openapi(endpoints: Sequence[Endpoint], version: str) -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {
        "Error": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {"type": "object", "required": ["message", "type"]}},
        }
    }
    failed = {"description": "An error", "content": {"application/json": {"schema": _ref("Error")}}}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", endpoint.path)
        content: dict[str, Any] = {endpoint.content: {"schema": {}}}
        if endpoint.body is not None and "stream" in endpoint.body.model_fields:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        operation: dict[str, Any] = {
            "summary": endpoint.summary,
            "operationId": f"{endpoint.method.lower()}{re.sub(r'[^a-z0-9]+', '_', path)}",
            "responses": {"200": {"description": "Success", "content": content}, "default": failed},
        }
        if endpoint.needs_key:
            operation["security"] = [{"key": []}, {"anthropic": []}]
        names = re.findall(r"\{(\w+)\}", path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if endpoint.body is not None:
            schema = endpoint.body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas[endpoint.body.__name__] = schema
            body = {"application/json": {"schema": _ref(endpoint.body.__name__)}}
            operation["requestBody"] = {"required": True, "content": body}
        elif endpoint.form is not None:
            operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": endpoint.form}}}
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Halve", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "anthropic": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
