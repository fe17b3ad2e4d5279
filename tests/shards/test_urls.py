"""Which URLs are taken, and that none of them is shown with its secrets."""

import pytest

from fractalshards.errors import UsageError
from fractalshards.remote.stores import parse_location, redact


@pytest.mark.parametrize(
    ("text", "scheme", "file"),
    [
        ("shards/single", "file", "shards/single/f"),
        ("shards/single/", "file", "shards/single/f"),
        ("./odd:name", "file", "odd:name/f"),
        ("file:///data/a set/", "file", "/data/a set/f"),
        ("s3://bucket", "s3", "bucket/f"),
        ("s3://bucket/a set/x//", "s3", "bucket/a set/x/f"),
        ("gs://bucket/x", "gs", "bucket/x/f"),
        ("gcs://bucket/x", "gs", "bucket/x/f"),
        ("hf://datasets/user/name", "hf", "datasets/user/name/f"),
        ("HTTPS://Host.org/data/", "http", "https://Host.org/data/f"),
        ("http://host:8000", "http", "http://host:8000/f"),
        ("https://host/a set/?sig=a%2Fb&x=1", "http", "https://host/a%20set/f?sig=a%2Fb&x=1"),
        ("https://host/a%20set", "http", "https://host/a%20set/f"),
    ],
)
def test_urls_of_folders(text: str, scheme: str, file: str) -> None:
    location = parse_location(text)
    assert (location.scheme, location.file("f")) == (scheme, file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pipe:cat /etc/passwd",
        "pipe://cat",
        "simplecache::s3://bucket/x",
        "zip://*.tar::https://host/x.zip",
        "reference://x",
        "jupyter://host/x",
        "memory://x",
        "ftp://host/x",
        "git://x",
        "s3:bucket",
        "s3://",
        "s3:///x",
        "s3://key:secret@bucket/x",
        "hf://user/model",
        "hf://datasets/user",
        "http://",
        "https:///x",
        "https://host:port/x",
        "https://host/x#part",
        "file://host/x",
        "file:x",
    ],
)
def test_other_urls_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_location(text)
    assert "secret" not in str(error.value)


def test_secrets_are_not_shown() -> None:
    location = parse_location("https://me:pass@host/data?token=abc")
    assert location.shown == "https://***@host/data"
    assert location.file("f") == "https://me:pass@host/data/f?token=abc"
    text = "cannot reach https://me:pass@host/data/f?token=abc, url='https://host/f?sig=x'"
    assert redact(text) == "cannot reach https://***@host/data/f?***, url='https://host/f?***'"
