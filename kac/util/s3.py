"""S3 with literal names: a path is one key or one prefix, and no character has a special meaning."""

from typing import Any

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

KEYS_PER_REQUEST = 1000
"""The largest number of keys that S3 removes in one request."""


class ExactS3(S3FileSystem):  # type: ignore[misc]
    """s3fs with literal names.

    When s3fs removes or copies a tree, it expands ``[ ] ? *`` in the path. It also truncates a key at ``?versionId=``,
    and lists the empty keys ending in ``/`` that S3 consoles create for folders. This class does none of these.
    """

    def split_path(self, path: str) -> tuple[str, str, None]:
        """Return the bucket, the key, and None as the version."""
        stripped = self._strip_protocol(path).lstrip("/")
        if "/" not in stripped:
            return stripped, "", None
        bucket, key = self._find_bucket_key(stripped)
        return bucket, key + path[len(path.rstrip("/")) :], None

    async def _expand_path(
        self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None, assume_literal: bool = True
    ) -> Any:
        return await super()._expand_path(path, recursive, maxdepth, assume_literal=True)

    async def _find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any) -> Any:
        detail = options.pop("detail", False)
        found = await super()._find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True, **options)
        files = {name: info for name, info in found.items() if not _is_marker(info)}
        return files if detail else list(files)

    find = sync_wrapper(_find)

    async def _ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        found = [info for info in await super()._ls(path, detail=True, **options) if not _is_marker(info)]
        return found if detail else sorted(info["name"] for info in found)

    def remove_tree(self, path: str) -> None:
        """Remove the key ``path`` and all keys below it. Raise ``OSError`` if S3 fails to remove a key."""
        bucket, key, _ = self.split_path(path)
        keys: list[str] = [key]
        page: dict[str, Any] = {"IsTruncated": True}
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{key}/", "MaxKeys": KEYS_PER_REQUEST}
        while page["IsTruncated"]:
            page = self.call_s3("list_objects_v2", **request)
            keys += [entry["Key"] for entry in page.get("Contents", [])]
            request["ContinuationToken"] = page.get("NextContinuationToken", "")
        for start in range(0, len(keys), KEYS_PER_REQUEST):
            objects = [{"Key": name} for name in keys[start : start + KEYS_PER_REQUEST]]
            done = self.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
            if errors := done.get("Errors"):
                raise OSError(f"S3 did not remove {bucket}/{errors[0]['Key']}: {errors[0].get('Message', 'no reason')}")


def _is_marker(info: dict[str, Any]) -> bool:
    """Return whether an entry is an empty key that an S3 console created for a folder."""
    return info["type"] == "file" and info["name"].endswith("/") and not info["size"]
