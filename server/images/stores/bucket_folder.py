"""What is swept from a bucket that may hold more names than memory does: no list of them is kept."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LISTED = 1000  # names at a time, as S3 lists and deletes them
Item = Mapping[str, Any]  # obstore's `ObjectMeta`


@dataclass(frozen=True, slots=True)
class BucketFolder:
    """The objects of a bucket whose names begin with `prefix`. Methods raise obstore's errors."""

    obstore: Any
    bucket: Any
    prefix: str

    def sweep(self, oldest_allowed: float, cap: int) -> int:
        """Delete what was put before `oldest_allowed` (Unix seconds), then the oldest until `cap` bytes hold the rest.

        How many bytes stay.
        """
        sizes = self._delete_expired(oldest_allowed)
        total = sum(sizes.values())
        return total if total <= cap else self._delete_oldest(sizes, cap)

    def _delete_expired(self, oldest_allowed: float) -> Mapping[int, int]:
        """The bytes of the objects that stay, by the second in which they were put."""
        sizes = Counter[int]()
        for batch in self._list():
            staying = [item for item in batch if put_at(item) >= oldest_allowed]
            self._delete([item for item in batch if put_at(item) < oldest_allowed])
            for item in staying:
                sizes[int(put_at(item))] += item["size"]
        return sizes

    def _delete_oldest(self, sizes: Mapping[int, int], cap: int) -> int:
        """All that older seconds put, and of the one that decides what is too much. How many bytes stay."""
        left = sum(sizes.values())
        for second in sorted(sizes):
            if left - sizes[second] <= cap:
                break
            left -= sizes[second]
        deciding = []
        for batch in self._list():
            self._delete([item for item in batch if int(put_at(item)) < second])
            deciding += [item for item in batch if int(put_at(item)) == second]
        listed: int = sum(item["size"] for item in deciding)
        left += listed - sizes[second]  # other servers delete, too
        leaving = []
        for item in sorted(deciding, key=put_at):
            if left > cap:
                leaving.append(item)
                left -= item["size"]
        self._delete(leaving)
        return left

    def _list(self) -> Iterable[Sequence[Item]]:
        listed: Iterable[Sequence[Item]] = self.obstore.list(self.bucket, prefix=self.prefix, chunk_size=LISTED)
        return listed

    def _delete(self, items: Sequence[Item]) -> None:
        if items:
            self.obstore.delete(self.bucket, [item["path"] for item in items])


def put_at(item: Item) -> float:
    """Unix seconds by the bucket's clock."""
    when: float = item["last_modified"].timestamp()
    return when
