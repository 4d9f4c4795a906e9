"""Which pages of the cache are free, and how many sequences use each of the others."""

from collections.abc import Iterable


class PagePool:
    """Page numbers and how many sequences use each."""

    def __init__(self, pages: int):
        """A pool of `pages` free pages."""
        self.size = pages
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one user."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One user less for each; without any, a page is free."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
