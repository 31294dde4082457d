"""What the loopback Hub keeps: contents by their hash, and repositories with branches, tags and commits."""

import base64
import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path


MAIN = "main"
ATTRIBUTES = ".gitattributes"
# The Hub writes this file into every new repository; it says what goes through LFS.
LARGE_SUFFIXES = ("7z", "arrow", "bin", "gz", "h5", "h5ad", "npy", "npz", "parquet", "pt", "safetensors", "zip")


class Refused(Exception):
    """A refused request: `status`, a message, and the code by which clients choose the exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **more):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.body = {"error": message, **more}


@dataclass(frozen=True)
class File:
    """A file of a commit: its content by SHA-256, its git object id, and the commit that last changed it."""

    sha256: str
    size: int
    oid: str
    lfs: bool = False
    commit: str = ""

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def details(self) -> dict:
        size = len(_pointer(self.sha256, self.size))
        # Listings name the hash `oid`, the list of siblings names it `sha256`.
        named = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": size}
        return {"lfs": named} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


class Contents:
    """Bytes by their SHA-256, one file each in `folder`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def read(self, file: File) -> bytes:
        return self.path(file.sha256).read_bytes()

    def store(self, content: bytes) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.path(sha256).write_bytes(content)
        return File(sha256, len(content), _git_oid(content))


@dataclass
class Repository:
    kind: str
    id: str
    contents: Contents
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    # Files that were uploaded here and verified, by SHA-256. A commit may name no other large files.
    objects: set[str] = field(default_factory=set)

    def begin(self, author: str):
        """The commit that the Hub makes in a new repository."""
        attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES)
        self._append(MAIN, "initial commit", "", author, {ATTRIBUTES: self.contents.store(attributes.encode())}, set())

    def at(self, revision: str = MAIN) -> Commit:
        """The commit of a branch, a tag or a commit hash."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit]

    def history(self, revision: str = MAIN) -> list[Commit]:
        """The commits of a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def is_large(self, path: str, size: int, threshold: int, revision: str) -> bool:
        """Whether a file goes through LFS: by its size or by the `.gitattributes` of the revision."""
        files = self.at(revision).files
        lines = self.contents.read(files[ATTRIBUTES]).decode().splitlines() if ATTRIBUTES in files else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        return size >= threshold or any(fnmatch(path, p) or fnmatch(Path(path).name, p) for p in patterns)

    def entries(self, revision: str, expand: bool = False) -> dict[str, dict]:
        """Files and folders of a revision by path, in order; `expand` adds the commit that last changed each."""
        commit = self.at(revision)
        age = {c.id: age for age, c in enumerate(self.history(commit.id))}
        entries, last = {}, {}
        for path, file in sorted(commit.files.items()):
            entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": file.size, **file.details}
            last[path] = file.commit
            for folder in map(str, list(Path(path).parents)[:-1]):
                entry = entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "", "size": 0})
                entry["oid"] = hashlib.sha1((entry["oid"] + path + file.oid).encode()).hexdigest()
                last[folder] = min(last.get(folder, file.commit), file.commit, key=age.__getitem__)
        if expand:
            for path, entry in entries.items():
                changed = self.commits[last[path]]
                entry["lastCommit"] = {"id": changed.id, "title": changed.title, "date": changed.date}
        return dict(sorted(entries.items()))

    def tree(self, revision: str, root: str, recursive: bool, expand: bool) -> list[dict]:
        """The entries in the folder `root` ("" is the top), or the file `root` itself."""
        entries = self.entries(revision, expand)
        if root in self.at(revision).files:
            return [entries[root]]
        if root and root not in entries:
            raise Refused(404, f'{root} does not exist on "{revision}"', "EntryNotFound")
        inside = f"{root}/" if root else ""
        depth = inside.count("/")
        return [e for p, e in entries.items() if p.startswith(inside) and (recursive or p.count("/") == depth)]

    def commit(self, branch: str, author: str, lines: list[dict]) -> Commit:
        """Apply the lines of a commit request to a branch, all of them or none."""
        if branch not in self.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *operations = lines
        head = self.at(branch)
        if not head.id.startswith(header["value"].get("parentCommit", head.id)):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        added, deleted = {}, set()
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            match key:
                case "file":
                    added[path] = self.contents.store(base64.b64decode(value["content"], validate=True))
                case "lfsFile":
                    added[path] = self._uploaded(path, value["oid"])
                case "deletedFile" | "deletedFolder":
                    inside = path.rstrip("/") + "/"
                    found = {p for p in head.files if (p == path if key == "deletedFile" else p.startswith(inside))}
                    if not found:
                        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    deleted |= found
                case _:
                    raise Refused(501, f"this server does not speak the commit operation {key}")
        title, message = header["value"]["summary"], header["value"].get("description", "")
        return self._append(branch, title, message, author, added, deleted)

    def _uploaded(self, path: str, sha256: str) -> File:
        if sha256 not in self.objects:
            raise Refused(400, f"{path}: the LFS object {sha256} was not uploaded")
        size = self.contents.path(sha256).stat().st_size
        return File(sha256, size, _git_oid(_pointer(sha256, size)), lfs=True)

    def _append(self, branch, title, message, author, added: dict[str, File], deleted: set[str]) -> Commit:
        parent = self.branches.get(branch)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        kept = self.commits[parent].files if parent else {}
        kept = {path: file for path, file in kept.items() if path not in deleted}
        content = sorted((path, file.oid) for path, file in {**kept, **added}.items())
        # The number of commits keeps two equal commits of one microsecond apart.
        identity = json.dumps([parent, title, message, author, date, len(self.commits), content])
        id = hashlib.sha1(identity.encode()).hexdigest()
        new = {path: replace(file, commit=id) for path, file in added.items()}
        self.commits[id] = Commit(id, parent, title, message, author, date, {**kept, **new})
        self.branches[branch] = id
        return self.commits[id]


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
