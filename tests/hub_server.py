"""
A Hugging Face Hub on the loopback: a real HTTP server that the real clients of `huggingface_hub`, `datasets` and
`transformers` talk to unchanged, with faults on demand.

It has users with tokens, model and dataset repositories with branches, tags and a history of commits, small files in
the commits and large ones through LFS. As on the Hub, large files travel through a storage of another origin, by
signed addresses and without the user's token. Xet is not supported, so clients run with `HF_HUB_DISABLE_XET=1`. A request
that the server does not know is answered with 501, and with its name.
"""

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import uvicorn
import yaml
from hub_faults import Fault, Faults, Seen
from hub_metadata import problems_of
from hub_repository import ATTRIBUTES, MAIN, Contents, Refused, Repository
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route


KINDS = ("model", "dataset")
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---", re.DOTALL)


@dataclass
class Token:
    user: str
    write: bool = True
    expired: bool = False


class HubServer:
    """
    The Hub of one test, to be used as a context manager.

    Args:
        folder (`Path`): where contents are kept.
        page_size (`int`): entries of one page of a listing.
        large (`int`): files from this many bytes on go through LFS whatever their name.

    Attributes: `url`; `storage_url` (the other origin); `repositories` by kind and id; `tokens`.

    Example:
        with HubServer(folder) as hub:
            api = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
            hub.refuse("/commit/", 503)
            api.upload_folder(repo_id=api.create_repo("ada/model").repo_id, folder_path=checkpoint)
            hub.read("ada/model")["config.json"]
    """

    def __init__(self, folder: Path, page_size: int = 1000, large: int = 10_000_000):
        self.contents = Contents(folder)
        self.page_size = page_size
        self.large = large
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: dict[str, Token] = {}
        self.organizations: dict[str, set[str]] = {}
        self._secret = secrets.token_bytes(16)
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        ports = [s.getsockname()[1] for s in self._sockets]
        self.url, self.storage_url = (f"http://127.0.0.1:{port}" for port in ports)
        handlers = {Refused: _refused, HTTPException: _unspoken}
        self._apps = {
            ports[0]: Starlette(routes=self._hub_routes(), exception_handlers=handlers),
            ports[1]: Starlette(routes=self._storage_routes(), exception_handlers=handlers),
        }
        self._faults = Faults(self._dispatch, self._transport)
        config = uvicorn.Config(
            self._faults, http="h11", ws="none", lifespan="off", log_level="critical", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=(self._sockets,), daemon=True)

    # Running

    def start(self):
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise RuntimeError("the server did not start within 10 seconds")
            time.sleep(0.005)

    def stop(self):
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    async def _dispatch(self, scope, receive, send):
        # Routes match the path as it was sent: an encoded slash belongs to the name of a branch.
        await self._apps[scope["server"][1]]({**scope, "path": scope["raw_path"].decode()}, receive, send)

    def _transport(self, client: tuple[str, int]) -> asyncio.Transport | None:
        return next((c.transport for c in self._server.server_state.connections if c.client == client), None)

    # What a test arranges and looks at

    @property
    def requests(self) -> list[Seen]:
        """Every request that came, in the order of the answers."""
        return self._faults.requests

    @property
    def crashes(self) -> list[Exception]:
        """Exceptions of the server itself; there should be none."""
        return self._faults.crashes

    def count(self, method: str, path: str) -> int:
        """How many requests of this method had a path that matches the regular expression `path`."""
        return sum(seen.method == method and re.search(path, seen.path) is not None for seen in self.requests)

    def add_user(self, user: str, organizations: tuple[str, ...] = (), write: bool = True) -> str:
        """A token of `user`, who may write to their own namespace and to those of `organizations`."""
        token = f"hf_{secrets.token_hex(16)}"
        self.organizations[user] = set(organizations)
        self.tokens[token] = Token(user, write)
        return token

    def expire(self, token: str):
        """Answer requests with this token with 401 from now on."""
        self.tokens[token].expired = True

    def repository(self, id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, id]

    def read(self, id: str, revision: str = MAIN, kind: str = "model") -> dict[str, bytes]:
        """Every file of a revision, except the `.gitattributes` that the Hub wrote itself."""
        files = self.repository(id, kind).at(revision).files
        return {path: self.contents.read(file) for path, file in files.items() if path != ATTRIBUTES}

    def refuse(self, path: str, status: int, method: str | None = None, times: int = 1, headers: dict | None = None):
        """Answer the next `times` requests whose path matches the regular expression `path` with `status`."""
        self._faults.faults.append(Fault(path, method, times, status, headers or {}))

    def cut(self, path: str, of: str, after: int = 0, method: str | None = None, times: int = 1):
        """
        Cut the connections of the next `times` requests that match after `after` bytes of a body, if the body is longer. It is
        the body of the request (`of="request"`) or of the answer (`of="answer"`). An answer is cut when the request has been
        carried out; an answer cut after 0 bytes says nothing at all.
        """
        if of not in ("request", "answer"):
            raise ValueError(f'`of` must be "request" or "answer", found {of!r}')
        self._faults.faults.append(Fault(path, method, times, after=after, of_request=of == "request"))

    # Who asks, and for what

    def _caller(self, request: Request) -> Token | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        token = self.tokens.get(header.removeprefix("Bearer "))
        if token is None or token.expired:
            raise Refused(401, "Invalid credentials in Authorization header")
        return token

    def _owns(self, token: Token | None, namespace: str) -> bool:
        return token is not None and (namespace == token.user or namespace in self.organizations[token.user])

    def _writer(self, request: Request, namespace: str) -> Token:
        token = self._caller(request)
        if token is None:
            raise Refused(401, "Invalid username or password.")
        if not token.write:
            raise Refused(403, "You must use a token with write permission")
        if not self._owns(token, namespace):
            raise Refused(403, f"You don't have the rights to write under the namespace {namespace}")
        return token

    def _find(self, request: Request, kind: str, write: bool) -> Repository:
        namespace = request.path_params["namespace"]
        repository = self.repositories.get((kind, f"{namespace}/{request.path_params['name']}"))
        token = self._caller(request)
        if repository is None or (repository.private and not self._owns(token, namespace)):
            status, message = (401, "Invalid username or password.") if token is None else (404, "Repository not found")
            raise Refused(status, message, "RepoNotFound")
        if write:
            self._writer(request, namespace)
        return repository

    def _hub_routes(self) -> list[Route]:
        routes = [
            Route("/api/whoami-v2", self._whoami),
            Route("/api/validate-yaml", self._validate_yaml, methods=["POST"]),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/repos/delete", self._delete, methods=["DELETE"]),
        ]
        for kind in KINDS:
            api = f"/api/{kind}s/{{namespace}}/{{name}}"
            web = "/{namespace}/{name}" if kind == "model" else f"/{kind}s/{{namespace}}/{{name}}"
            cache = f"/api/resolve-cache/{kind}s/{{namespace}}/{{name}}/{{revision}}/{{path:path}}"
            routes += [
                Route(path, self._of_repository(kind, answer, write), methods=[method])
                for method, path, answer, write in (
                    ("GET", api, self._info, False),
                    ("GET", api + "/auth-check", lambda *_: JSONResponse({}), False),
                    ("GET", api + "/revision/{revision}", self._info, False),
                    ("GET", api + "/tree/{revision}", self._tree, False),
                    ("GET", api + "/tree/{revision}/{path:path}", self._tree, False),
                    ("POST", api + "/paths-info/{revision}", self._paths_info, False),
                    ("GET", api + "/commits/{revision}", self._commits, False),
                    ("GET", api + "/refs", self._refs, False),
                    ("POST", api + "/branch/{revision}", self._create_branch, True),
                    ("DELETE", api + "/branch/{revision}", self._delete_branch, True),
                    ("POST", api + "/tag/{revision}", self._create_tag, True),
                    ("POST", api + "/preupload/{revision}", self._preupload, True),
                    ("POST", api + "/commit/{revision}", self._commit, True),
                    ("POST", web + ".git/info/lfs/objects/batch", self._lfs_batch, True),
                    ("POST", web + ".git/info/lfs/objects/verify", self._lfs_verify, True),
                    ("GET", web + "/resolve/{revision}/{path:path}", self._resolve, False),
                    ("GET", cache, self._resolve_cache, False),
                )
            ]
        return routes

    def _of_repository(self, kind: str, answer: Callable, write: bool) -> Callable:
        """An endpoint that finds the repository, checks the caller's rights and reads the body whole."""

        async def endpoint(request: Request) -> Response:
            request.scope["path_params"] = {name: unquote(value) for name, value in request.path_params.items()}
            repository = self._find(request, kind, write)
            body = await request.body()
            # `answer` never awaits, so that it finds and leaves the repository whole.
            return answer(request, repository, body)

        return endpoint

    # Users and repositories

    async def _whoami(self, request: Request) -> Response:
        token = self._caller(request)
        if token is None:
            raise Refused(401, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"role": "write" if token.write else "read"}}
        orgs = [{"type": "org", "name": name} for name in sorted(self.organizations[token.user])]
        return JSONResponse({"type": "user", "name": token.user, "fullname": token.user, "orgs": orgs, "auth": access})

    async def _validate_yaml(self, request: Request) -> Response:
        asked = await request.json()
        try:
            data = _front_matter(asked["content"])
            problems = problems_of(data) if asked["repoType"] == "model" else []
        except yaml.YAMLError as error:
            problems = [str(error)]
        errors = [{"message": problem} for problem in problems]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def _named(self, request: Request) -> tuple[str, str, Token, bool]:
        """The kind and the id of the repository that the body names, the caller, and whether it shall be private."""
        asked = await request.json()
        caller = self._caller(request)
        namespace = asked.get("organization") or (caller.user if caller else "")
        writer = self._writer(request, namespace)
        kind = asked.get("type", "model")
        if kind not in KINDS:
            raise Refused(501, f"this server has repositories of kind {', '.join(KINDS)}; asked for {kind}")
        return kind, f"{namespace}/{asked['name']}", writer, asked.get("visibility") == "private"

    async def _create(self, request: Request) -> Response:
        kind, id, writer, private = await self._named(request)
        url = self.url + ("/" if kind == "model" else f"/{kind}s/") + id
        if (kind, id) in self.repositories:
            raise Refused(409, f"You already created this {kind} repo: {id}", url=url)
        self.repositories[kind, id] = Repository(kind, id, self.contents, private)
        self.repositories[kind, id].begin(writer.user)
        return JSONResponse({"url": url, "name": id, "id": id})

    async def _delete(self, request: Request) -> Response:
        kind, id, *_ = await self._named(request)
        if self.repositories.pop((kind, id), None) is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return JSONResponse({})

    def _info(self, request: Request, repository: Repository, _) -> Response:
        commit = repository.at(request.path_params.get("revision", MAIN))
        blobs = request.query_params.get("blobs") == "true"
        files = commit.files
        card = _front_matter(self.contents.read(files["README.md"]).decode()) if "README.md" in files else {}
        siblings = [
            {"rfilename": path} | ({"size": file.size, "blobId": file.oid, **file.details} if blobs else {})
            for path, file in sorted(files.items())
        ]
        created = repository.history(commit.id)[-1].date
        return JSONResponse(
            {"id": repository.id, "author": repository.id.split("/")[0], "sha": commit.id, "siblings": siblings}
            | {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
            | {"tags": card.get("tags") or [], "cardData": card, "lastModified": commit.date, "createdAt": created}
        )

    # Listings

    def _page(self, request: Request, items: list) -> Response:
        start = int(request.query_params.get("cursor", 0))
        end = start + self.page_size
        following = request.url.include_query_params(cursor=end)
        headers = {"Link": f'<{following}>; rel="next"'} if end < len(items) else {}
        return JSONResponse(items[start:end], headers=headers)

    def _tree(self, request: Request, repository: Repository, _) -> Response:
        recursive, expand = (request.query_params.get(option) == "true" for option in ("recursive", "expand"))
        params = request.path_params
        return self._page(request, repository.tree(params["revision"], params.get("path", ""), recursive, expand))

    def _paths_info(self, request: Request, repository: Repository, body: bytes) -> Response:
        asked = parse_qs(body.decode())
        entries = repository.entries(request.path_params["revision"], asked.get("expand") == ["true"])
        return JSONResponse([entries[path] for path in asked.get("paths", []) if path in entries])

    def _commits(self, request: Request, repository: Repository, _) -> Response:
        commits = [
            {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repository.history(request.path_params["revision"])
        ]
        return self._page(request, commits)

    # Branches and tags

    def _refs(self, _, repository: Repository, __) -> Response:
        def listed(refs: dict[str, str], kind: str) -> list[dict]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        return JSONResponse({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def _create_branch(self, request: Request, repository: Repository, body: bytes) -> Response:
        branch = request.path_params["revision"]
        if branch in repository.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = repository.at(json.loads(body).get("startingPoint", MAIN)).id
        return JSONResponse({})

    def _delete_branch(self, request: Request, repository: Repository, _) -> Response:
        branch = request.path_params["revision"]
        if repository.branches.pop(branch, None) is None:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return JSONResponse({})

    def _create_tag(self, request: Request, repository: Repository, body: bytes) -> Response:
        tag = json.loads(body)["tag"]
        if tag in repository.tags:
            raise Refused(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = repository.at(request.path_params["revision"]).id
        return JSONResponse({})

    # Uploading

    def _preupload(self, request: Request, repository: Repository, body: bytes) -> Response:
        asked = json.loads(body)
        if asked.get("gitIgnore"):
            raise Refused(501, "this server does not read .gitignore; leave it out of the commit")
        revision = request.path_params["revision"]
        files = repository.at(revision).files
        answers = []
        for file in asked["files"]:
            path = file["path"]
            large = repository.is_large(path, file["size"], self.large, revision)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": files[path].etag} if path in files else {}))
        return JSONResponse({"files": answers})

    def _lfs_batch(self, request: Request, repository: Repository, body: bytes) -> Response:
        verify = {"href": f"{self.url}{request.scope['path'].removesuffix('batch')}verify"}
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": self._signed("PUT", asked["oid"])}
            actions = {} if asked["oid"] in repository.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _lfs_verify(self, _, repository: Repository, body: bytes) -> Response:
        asked = json.loads(body)
        blob = self.contents.path(asked["oid"])
        if not blob.is_file() or blob.stat().st_size != asked["size"]:
            raise Refused(404, f"the LFS object {asked['oid']} of {asked['size']} bytes was not uploaded")
        repository.objects.add(asked["oid"])
        return JSONResponse({})

    def _commit(self, request: Request, repository: Repository, body: bytes) -> Response:
        if request.query_params.get("create_pr"):
            raise Refused(501, "this server has no pull requests")
        lines = [json.loads(line) for line in body.splitlines()]
        commit = repository.commit(request.path_params["revision"], self._caller(request).user, lines)
        url = f"{self.url}/{repository.id}/commit/{commit.id}"
        return JSONResponse({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})

    # Downloading

    def _resolve(self, request: Request, repository: Repository, _) -> Response:
        path = request.path_params["path"]
        commit = repository.at(request.path_params["revision"])
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        if file.lfs:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.etag}"'}
            return Response(None, 302, headers | {"Location": self._signed("GET", file.sha256)})
        location = f"/api/resolve-cache/{repository.kind}s/{repository.id}/{commit.id}/{quote(path)}"
        return Response(None, 307, headers | {"Location": location})

    def _resolve_cache(self, request: Request, repository: Repository, _) -> Response:
        commit = repository.at(request.path_params["revision"])
        file = commit.files[request.path_params["path"]]
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"'}
        return FileResponse(self.contents.path(file.sha256), headers=headers)

    # The storage: no user and no token, but signed addresses

    def _storage_routes(self) -> list[Route]:
        return [
            Route("/objects/{oid}", self._get_object, methods=["GET"]),
            Route("/objects/{oid}", self._put_object, methods=["PUT"]),
        ]

    def _signed(self, method: str, oid: str) -> str:
        signature = hmac.new(self._secret, f"{method} {oid}".encode(), "sha256").hexdigest()
        return f"{self.storage_url}/objects/{oid}?signature={signature}"

    def _check_signature(self, request: Request, method: str) -> Path:
        if "authorization" in request.headers:
            raise Refused(400, "the storage takes signed addresses only; found an Authorization header as well")
        oid = request.path_params["oid"]
        if str(request.url) != self._signed(method, oid):
            raise Refused(403, f"no valid signature for {method} {oid}")
        return self.contents.path(oid)

    async def _get_object(self, request: Request) -> Response:
        blob = self._check_signature(request, "GET")
        return FileResponse(blob, headers={"ETag": f'"{blob.name}"'})

    async def _put_object(self, request: Request) -> Response:
        blob = self._check_signature(request, "PUT")
        partial = blob.with_name(f"{secrets.token_hex(8)}.partial")
        digest = hashlib.sha256()
        try:
            with open(partial, "wb") as file:
                async for chunk in request.stream():
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != blob.name:
                raise Refused(400, f"expected an object of SHA-256 {blob.name}, found {digest.hexdigest()}")
            partial.replace(blob)
        finally:
            partial.unlink(missing_ok=True)
        return Response(headers={"ETag": f'"{blob.name}"'})


def _front_matter(card: str) -> dict:
    """The YAML block at the head of a card. Raises `yaml.YAMLError` if it is not YAML."""
    block = _FRONT_MATTER.match(card)
    return (yaml.safe_load(block.group(1)) if block else None) or {}


async def _refused(_, error: Refused) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _unspoken(request: Request, _) -> Response:
    return await _refused(request, Refused(501, f"this server does not speak {request.method} {request.url.path}"))
