"""The download of MNIST, from servers on loopback."""

import contextlib
import errno
import gc
import gzip
import hashlib
import itertools
import math
import os
import pathlib
import socket
import threading
import time
import types

import numpy as np
import pytest

from training import mnist
from training.datasets import read_dataset
from training.tests.conftest import idx, peak_memory

DIGESTS = """
t10k-labels-idx1-ubyte.gz 10008 ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2
train-labels-idx1-ubyte.gz 60008 65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
t10k-images-idx3-ubyte.gz 7840016 0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
train-images-idx3-ubyte.gz 47040016 ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
"""
MNIST = {
    name: (int(size), digest) for name, size, digest in map(str.split, DIGESTS.split("\n")[1:-1])
}
FILES = tuple(MNIST)
SMALL, LARGE = FILES[0], FILES[-1]
NOT_FOUND = b"HTTP/1.0 404 Not Found\r\n\r\n"


def test_the_digests_are_those_of_mnist():
    assert len(mnist.MNIST_MIRRORS) >= 2
    assert mnist.MNIST_FILES == MNIST
    assert tuple(mnist.MNIST_FILES) == FILES  # the smallest first: it is asked of every mirror


@pytest.fixture(scope="module")
def contents():
    """{name: unpacked}: small files in the place of MNIST's; the largest comes in pieces."""
    labels = np.arange(6, dtype=np.uint8)
    images = np.random.default_rng(0).integers(0, 256, (6, 180, 180), np.uint8)
    arrays = (labels[:4], labels, images[:4], images)
    return {name: idx(array) for name, array in zip(FILES, arrays, strict=True)}


@pytest.fixture
def packed(contents, monkeypatch):
    """{name: packed} of these files, with their true sizes and digests in the place of MNIST's."""
    files = {name: (len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}
    monkeypatch.setattr(mnist, "MNIST_FILES", files)
    return {name: gzip.compress(content, mtime=0) for name, content in contents.items()}


class Server:
    """A server on loopback that sends whatever `answer(name)` yields and then hangs up.

    Written on bare sockets because most of what is tested here no proper server would do.
    """

    def __init__(self, answer):
        self.answer, self.asked, self.ending = answer, [], threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0.02)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self.serve, name="server")]
        self.threads[0].start()

    def serve(self):
        while not self.ending.is_set():
            with contextlib.suppress(TimeoutError):
                connection = self.listener.accept()[0]
                thread = threading.Thread(target=self.talk, args=(connection,), name="server")
                self.threads.append(thread)
                thread.start()

    def talk(self, connection):
        with connection, contextlib.suppress(OSError):  # a client may hang up at any time
            connection.settimeout(5)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096)
            name = request.split()[1].decode().lstrip("/")
            self.asked.append(name)
            for piece in self.answer(name):
                if self.ending.is_set():
                    return
                connection.sendall(piece)

    def close(self):
        self.ending.set()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.listener.close()


@pytest.fixture
def serve():
    """A function that starts a Server; all of them are closed in the end."""
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
    gc.collect()  # so that a connection left open is noticed here, and not in some later test


@pytest.fixture
def released():
    """An event for which servers wait that are silent during a test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def good(serve, packed):
    """A mirror that gives every file."""
    return serve(lambda name: [response(packed[name])])


def response(content, length=None):
    """A whole answer; without a length, or with a wrong one, where that is given."""
    length = b"Content-Length: %d\r\n" % (len(content) if length is None else length)
    return b"HTTP/1.0 200 OK\r\n" + length * (length[-4:] != b"-1\r\n") + b"\r\n" + content


def files_in(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@pytest.mark.parametrize("known_length", [True, False])
def test_download_fetches_verifies_and_reports(tmp_path, serve, packed, known_length):
    seen, length = [], None if known_length else -1
    server = serve(lambda name: [response(packed[name], length)])
    folder = tmp_path / "data" / "mnist"
    mnist.download_mnist(folder, [server.url], progress=lambda *call: seen.append(call))
    assert files_in(folder) == packed
    assert server.asked == [SMALL, *FILES]  # the first is to see who answers
    assert list(dict.fromkeys(name for name, _, _ in seen)) == list(FILES)
    for name, content in packed.items():
        pieces = [done for of, done, _ in seen if of == name]
        assert pieces == sorted(set(pieces))
        assert pieces[-1] == len(content)
        assert {total for of, _, total in seen if of == name} == {len(content) * known_length}
    assert len([name for name, _, _ in seen if name == LARGE]) > 1
    assert read_dataset(folder)["x_train"].shape == (6, 1, 180, 180)


BAD_ANSWERS = {  # what a mirror sends that does not give the file with these packed bytes
    "breaks off": lambda content: [response(content[:-9], len(content))],
    "wrong bytes": lambda content: [response(gzip.compress(b"something else"))],
    "not even packed": lambda content: [response(b"<html>log in first</html>")],
    "too long": lambda content: [response(content + bytes(100_000))],
    "not there": lambda content: [NOT_FOUND],
    "a server error": lambda content: [b"HTTP/1.0 503 Busy\r\n\r\n"],
    "hangs up at once": lambda content: [],
    "no http": lambda content: [b"220 ready\r\n"],
    "a strange length": lambda content: [b"HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\n"],
    "a chunk cut off": lambda content: [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"
    ],
    "an empty file": lambda content: [response(b"")],
    **{
        f"a redirection to {place}": lambda content, place=place: [
            f"HTTP/1.0 302 Found\r\nLocation: {place}\r\n\r\n".encode()
        ]
        for place in ("file:///etc/hostname", f"/{SMALL}")  # the second one to itself
    },
    "silence": None,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers_are_errors_and_another_mirror_is_asked(
    tmp_path, serve, packed, good, released, name
):
    def answer(file):
        if name == "silence":
            released.wait(30)
            return []
        return BAD_ANSWERS[name](packed[file])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    bad, patience = serve(answer), 0.4 if name == "silence" else 5
    message = rf"^none of 2 mirrors answered within {patience} s: .+"
    with pytest.raises(OSError, match=message):
        mnist.download_mnist(tmp_path / "new", [closed, bad.url], patience=patience)
    assert os.listdir(tmp_path) == []
    before = len(bad.asked)
    mnist.download_mnist(tmp_path / "new", [bad.url, good.url], patience=5, timeout=0.5)
    assert files_in(tmp_path / "new") == packed
    assert len(bad.asked) - before <= 1 or name.endswith(SMALL)


def test_download_goes_on_at_another_mirror_in_the_middle(tmp_path, serve, packed):
    complete = threading.Event()
    fickle = serve(lambda name: [response(packed[name] if name == SMALL else b"not this one")])
    late = serve(lambda name: [response(packed[name]) if complete.is_set() else NOT_FOUND])
    mirrors = [late.url, fickle.url]
    mnist.download_mnist(tmp_path, mirrors, patience=5, progress=lambda *call: complete.set())
    assert files_in(tmp_path) == packed
    assert late.asked[-3:] == list(FILES[1:])


def test_every_mirror_is_asked_once_and_only_whole_files_are_kept(tmp_path, serve, packed):
    def small_only(name):
        return [response(packed[name] if name == SMALL else b"not this one")]

    servers = [serve(small_only), serve(small_only)]
    with pytest.raises(OSError, match=rf"^no mirror gives {FILES[1]}: .*; ") as caught:
        mnist.download_mnist(tmp_path, [server.url for server in servers], patience=5)
    for server in servers:
        assert server.asked.count(FILES[1]) == 1
        assert str(caught.value).count(f"{server.url}: {FILES[1]} is damaged: ") == 1
    assert files_in(tmp_path) == {SMALL: packed[SMALL]}


def test_files_that_are_there_are_kept_and_bad_ones_replaced(tmp_path, good, packed):
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
    mnist.download_mnist(tmp_path, [])  # nobody is asked for what is there
    (tmp_path / FILES[1]).write_bytes(packed[FILES[0]])
    (tmp_path / LARGE).write_bytes(packed[LARGE][:1000])
    before = (tmp_path / SMALL).stat().st_mtime_ns
    with pytest.raises(OSError, match="none of 0 mirrors answered"):
        mnist.download_mnist(tmp_path, [])
    mnist.download_mnist(str(tmp_path), [good.url], patience=5)
    assert good.asked == [SMALL, FILES[1], LARGE]  # the small one for the choice of mirror
    assert (tmp_path / SMALL).stat().st_mtime_ns == before
    assert files_in(tmp_path) == packed


def test_the_first_to_answer_is_asked_for_everything(tmp_path, serve, packed, good, released):
    def slow(name):
        released.wait(10)
        yield response(packed[name])

    late = serve(slow)
    mnist.download_mnist(tmp_path, [late.url, good.url], patience=5)
    released.set()
    assert good.asked == [SMALL, *FILES]
    assert late.asked in ([], [SMALL])
    assert files_in(tmp_path) == packed


def test_all_mirrors_are_asked_at_once(tmp_path, serve, packed, monkeypatch):
    everyone, questions, started = threading.Barrier(4, timeout=10), itertools.count(), []

    def answer(name):
        if next(questions) < 4:
            everyone.wait()
        return [response(packed[name])]

    servers = [serve(answer) for _ in range(4)]
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda own: (started.append(own), start(own)))
    mnist.download_mnist(tmp_path, [server.url for server in servers], patience=20)
    assert files_in(tmp_path) == packed
    asking = [thread for thread in started if thread.name != "server"]
    assert len(asking) == 4
    assert all(thread.daemon for thread in asking)  # none keeps the program from ending


def test_patience_is_for_the_first_answer_and_the_timeout_for_the_rest(
    tmp_path, monkeypatch, packed
):
    calls = []

    def fetch(mirror, name, timeout, progress=None):
        calls.append((mirror, name, timeout, progress))
        return packed[name]

    monkeypatch.setattr(mnist, "fetch", fetch)
    mnist.download_mnist(tmp_path / "chosen", ["m"], patience=7.5, timeout=3.5, progress=print)
    mnist.download_mnist(tmp_path / "default", ["m"])
    for patience, timeout, progress in ((7.5, 3.5, print), (2.0, 10.0, None)):
        expected = [("m", SMALL, patience, None)]
        expected += [("m", name, timeout, progress) for name in FILES]
        assert calls[:5] == expected
        del calls[:5]
    assert not calls


def test_patience_ends_where_no_timeout_reaches(tmp_path, monkeypatch, released):
    waited = []  # as looking up a name
    monkeypatch.setattr(mnist, "fetch", lambda *arguments: waited.append(released.wait(30)))
    with pytest.raises(OSError, match=r"none of 2 mirrors answered within 0\.1 s: all timed out"):
        mnist.download_mnist(tmp_path, ["a", "b"], patience=0.1)
    assert not waited


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, good, packed):
    def synchronize(descriptor):
        if os.fstat(descriptor).st_size > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", synchronize)
    with pytest.raises(OSError, match="No space left"):
        mnist.download_mnist(tmp_path, [good.url], patience=5)
    assert files_in(tmp_path) == {name: packed[name] for name in FILES[:2]}


# --- one file ---


def test_a_file_may_be_little_longer_than_its_content(serve, contents, packed):
    """Packed with a long comment in gzip's header: so much and one byte more."""
    limit = len(contents[SMALL]) + 1024

    def answer(path):
        content, size = packed[SMALL], limit + int(path.split("/")[0])
        comment = b"c" * (size - len(content) - 1) + b"\0"
        return [response(content[:3] + b"\x10" + content[4:10] + comment + content[10:])]

    server = serve(answer)
    assert len(mnist.fetch(f"{server.url}/0", SMALL, 5)) == limit
    with pytest.raises(OSError, match=f"{SMALL} is too long or comes too slowly"):
        mnist.fetch(f"{server.url}/1", SMALL, 5)


@pytest.mark.parametrize(("seconds", "late"), [(60.0, False), (60.1, True)])
def test_a_whole_file_has_thirty_times_the_timeout(monkeypatch, good, packed, seconds, late):
    clock = [1000.0]
    monkeypatch.setattr(mnist, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def pass_time(name, done, total):
        clock[0] = 1000.0 + seconds

    if late:
        with pytest.raises(OSError, match=f"{LARGE} is too long or comes too slowly"):
            mnist.fetch(good.url, LARGE, 2.0, pass_time)
    else:
        assert mnist.fetch(good.url, LARGE, 2.0, pass_time) == packed[LARGE]


def test_bytes_that_trickle_in_are_given_up_in_time(monkeypatch, serve, packed):
    sent = []

    def trickle(name):
        yield response(b"", length=len(packed[name]))
        for byte in packed[name][:200]:
            time.sleep(0.005)
            sent.append(byte)
            yield bytes([byte])

    server, ticks = serve(trickle), itertools.count()
    # A clock that goes on by a second whenever it is looked at, so that no real time matters.
    monkeypatch.setattr(mnist, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    with pytest.raises(OSError, match="too slowly"):
        mnist.fetch(server.url, LARGE, 2)
    assert len(sent) < 200


CONTENT = np.random.default_rng(0).bytes(25_000) * 2  # a repetition that lies far back
PACKED = gzip.compress(CONTENT, mtime=0)
NOT_THE_FILE = {
    "cut off": PACKED[: len(PACKED) // 2],
    "the last byte cut off": PACKED[:-1],
    "its checksum cut off": PACKED[:-8],
    "another checksum": PACKED[:-8] + b"0000" + PACKED[-4:],
    "junk after it": PACKED + b"junk",
    "longer": gzip.compress(CONTENT + b"\0"),
    "shorter": gzip.compress(CONTENT[:-1]),
    "other bytes": gzip.compress(CONTENT[::-1]),
    "nothing": b"",
    "a bomb": gzip.compress(bytes(30_000_000)),
}


@pytest.mark.parametrize("name", NOT_THE_FILE)
def test_verify_takes_the_right_bytes_only_and_unpacks_no_more(name, monkeypatch):
    files = {"f": (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())}
    monkeypatch.setattr(mnist, "MNIST_FILES", files)
    mnist.verify("f", PACKED)

    def verify():
        message = "^f (is damaged: .+|is cut off or too long|has the wrong SHA-256)$"
        with pytest.raises(ValueError, match=message):
            mnist.verify("f", NOT_THE_FILE[name])

    assert peak_memory(verify) < 10**6


@pytest.mark.parametrize(
    ("parameter", "wrong"),
    [
        *(("directory", bad) for bad in (None, 3, [b"a"])),
        *(("mirrors", bad) for bad in (None, 1, "http://a", [1])),
        *((name, bad) for name in ("patience", "timeout") for bad in (0, -1, math.nan, "1", None)),
        *(("progress", bad) for bad in (3, "print")),
    ],
)
def test_download_refuses_what_makes_no_sense(parameter, wrong, tmp_path):
    right = {"directory": tmp_path, "mirrors": (), "patience": 1.0, "timeout": 1.0}
    words = "the path" if parameter == "directory" else parameter
    with pytest.raises((TypeError, ValueError), match=f"^download_mnist: {words} must be "):
        mnist.download_mnist(**{**right, parameter: wrong})
