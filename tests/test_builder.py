"""The builder's words, as engines and programs said them: BuildKit of engine 20.10.24, uv 0.13.9, pip 23.2, apt 2.6."""

from pathlib import Path

import docker.errors
import pytest

from fractal.images import build, builder
from fractal.images.builder import BuildError, Request, Story, explain
from fractal.images.image import Image
from fractal.images.rendering import COMMITTED

STORY = """\
#1 [internal] load build definition from Dockerfile.rendered
#1 sha256:05bb6db1f37befb991430b0286d7c6e51110260ae1c68e0e60f7255ba008a7f1
#1 transferring dockerfile: 1.2kB done
#1 DONE 0.0s

#3 [internal] load metadata for docker.io/library/fractal-base:bookworm-1a5623c9
#3 DONE 0.0s

#4 [base 1/1] FROM docker.io/library/fractal-base:bookworm-1a5623c9
#4 CACHED

#5 [part1 1/2] RUN mkdir -p /x
#5 CACHED

#6 [local1 1/2] COPY app/ /local/app/app
#6 DONE 0.1s

#7 [stage-3 2/2] RUN --mount=type=tmpfs,target=/run     --mount=type=secret,id=settings,mode=0444     . /run/secrets/settings  && echo doing; echo something is wrong >&2; exit 3
#7 sha256:232a1410a2f47fa80e68da0c92ece6fcc945e8cc78c9787e7e8eb5b8e886013e
#7 0.709 doing
#7 0.711 something is wrong
#7 ERROR: executor failed running [/bin/sh -c begun=@$(($(date +%s) - 600)); sh -ec "$0" && { :; } . /run/secrets/settings  && echo doing; echo something is wrong >&2; exit 3]: exit code: 3
------
 > [stage-3 2/2] RUN --mount=type=tmpfs,target=/run     --mount=type=secret,id=settings,mode=0444     . /run/secrets/settings  && echo doing; echo something is wrong >&2; exit 3:
------
executor failed running [/bin/sh -c begun=@$(($(date +%s) - 600)); sh -ec "$0" && { :; } . /run/secrets/settings  && echo doing; echo something is wrong >&2; exit 3]: exit code: 3
"""


def told(text: str) -> Story:
    story = Story("test")
    for line in text.splitlines(keepends=True):
        story.read(line)
    return story


def test_a_story_tells_what_was_run_and_what_failed() -> None:
    story = told(STORY)
    assert story.ran == 2  # what was cached was not run
    assert story.step == story.now == "[stage-3 2/2] RUN echo doing; echo something is wrong >&2; exit 3"
    assert story.failure()[:2] == ["doing", "something is wrong"]
    assert explain(story.failure(), story.step) == f"{story.step}: something is wrong."


def test_a_story_goes_on_while_it_is_told() -> None:
    story = Story("test")
    assert story.now == "sending the context"
    for line in STORY.splitlines():
        story.read(line)
        assert len(story.now) <= 100


UV = "error: No solution found when resolving dependencies\n  cause: Because {}.\n"
FETCH = "error: Failed to fetch: https://pypi.example/simple/colorama/\n  cause: error sending request for url (https://pypi.example/simple/colorama/)\n  cause: client error (Connect)\n"
FAILED = "executor failed running [/bin/sh -c apt-get update]: exit code: 100"
WORDS = {
    "apt": (f"Building dependency tree...\nReading state information...\nE: Unable to locate package nothing\n{FAILED}", "Debian has no package nothing in the base's release. Check its name."),
    "apt, only in name": (f"Package less is not available, but is referred to by another package.\n\nE: Package 'less' has no installation candidate\n{FAILED}", "Debian has no package less"),
    "apt, version": (f"E: Version '9.9-9' for 'less' was not found\nPackage less is not available, but\n{FAILED}", "Debian has no version 9.9-9 of less"),
    "apt, no network": (f"Err:1 http://nosuch.example/debian bookworm InRelease\n  Could not resolve 'nosuch.example'\nE: Unable to locate package less\n{FAILED}", "the network is not to be reached from inside the build (Could not resolve; E: Unable to locate package less)"),
    "uv, no version": (UV.format("there is no version of colorama==99.9 and you require colorama==99.9, we can conclude that your requirements are unsatisfiable"), "No index has the Python package colorama==99.9 for this Python"),
    "uv, no package": (UV.format("nothing-xyz was not found in the package registry and you require nothing-xyz==1.0, we can conclude that your requirements are unsatisfiable"), "No index has the Python package nothing-xyz==1.0 for this Python"),
    "uv, no way": (UV.format("requests==2.32.3 depends on urllib3>=1.21.1,<3 and you require requests==2.32.3, we can conclude that you require urllib3>=1.21.1,<3.\n         And because you require urllib3==3.0.0, we can conclude that your requirements are unsatisfiable"),
                   "the Python packages do not fit together. Because requests==2.32.3 depends on urllib3>=1.21.1,<3 and you require requests==2.32.3, we can conclude that you require urllib3>=1.21.1,<3. And because you require urllib3==3.0.0, we can conclude that your requirements are unsatisfiable. Change a version."),
    "uv, hash": ("Resolved 1 package in 120ms\nerror: Failed to download `colorama==0.4.6`\n  cause: Hash mismatch for `colorama==0.4.6`\n\n         Expected:\n           sha256:00\n\n         Computed:\n           sha256:11", "colorama==0.4.6: the file that was downloaded is not the one that was locked. If that is right: invoke lock."),
    "uv, certificate": (FETCH + "  cause: invalid peer certificate: Other(OtherError(CaUsedAsEndEntity))", "a certificate is not trusted inside the build. Give your network's own: --ca=FILE or FRACTAL_CA."),
    "uv, no name": (FETCH + "  cause: dns error\n  cause: error resolving DNS\n  cause: failed to lookup address information: Name or service not known", "the network is not to be reached from inside the build"),
    "uv, refused": (FETCH + "  cause: tcp connect error\n  cause: Connection refused (os error 111)", "the network is not to be reached from inside the build"),
    "pip, hash": ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the package versions, please update the hashes. Otherwise, examine the package contents carefully; someone may have tampered with them.\n    uv==0.13.9 from https://pypi.example/uv.whl:\n        Expected sha256 00", "uv==0.13.9: the file that was downloaded is not the one that was locked"),
    "pip, certificate": ("Could not fetch URL https://pypi.example/simple/colorama/: There was a problem confirming the ssl certificate: HTTPSConnectionPool(host='pypi.example', port=443): Max retries exceeded (Caused by SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:1006)'))) - skipping\nERROR: Could not find a version that satisfies the requirement colorama==0.4.6 (from versions: none)\nERROR: No matching distribution found for colorama==0.4.6", "a certificate is not trusted inside the build"),
    "pip, no version": ("ERROR: Could not find a version that satisfies the requirement uv==99.9 (from versions: 0.1.0)\nERROR: No matching distribution found for uv==99.9", "No index has the Python package uv==99.9."),
    "base": ('failed to solve with frontend dockerfile.v0: failed to create LLB definition: failed to do request: Head "https://nothing.example/v2/nothing/manifests/here": dial tcp: lookup nothing.example on 10.0.0.1:53: no such host', "its base is not to be had (https://nothing.example/v2/nothing/manifests/here). Load it into the engine, or name another one: --base, or FROM in a Dockerfile."),
    "base, denied": ("pull access denied for nothing/here, repository does not exist or may require 'docker login': denied: requested access to the resource is denied", "its base is not to be had (pull access denied for nothing/here)."),
    "disk": ("head: error writing 'standard output': No space left on device\nexecutor failed running [/bin/sh -c head]: exit code: 1", "the engine's disk is full. `docker system df`"),
    "disk, while copying": ("failed to copy files: failed to copy file: write /var/lib/docker/overlay2/x/merged/big: no space left on device", "the engine's disk is full."),
    "not in the context": ('failed to compute cache key: "/nothing" not found: not found', "STEP: the build context has no nothing."),
    "a link": ("error: /bin is a link to usr/bin: add files there\nexecutor failed running [/bin/sh -ec cd /local]: exit code: 1", "STEP: error: /bin is a link to usr/bin: add files there."),
    "silence": ("executor failed running [/bin/sh -c exit 3]: exit code: 3\n------\n > [2/2] RUN exit 3:\n------", "STEP: exit code: 3."),
    "silence of buildx": ('Dockerfile.rendered:5\n--------------------\n   5 | >>> RUN exit 3\n--------------------\nERROR: failed to solve: process "/bin/sh -c exit 3" did not complete successfully: exit code: 3', "STEP: exit code: 3."),
    "the old builder": ("Step 5/5 : RUN exit 3\n ---> Running in 0123\nThe command '/bin/sh -c exit 3' returned a non-zero code: 3", "STEP: non-zero code: 3."),
    "a parser": ("failed to solve with frontend dockerfile.v0: failed to create LLB definition: dockerfile parse error line 3: unknown instruction: FRUM", "STEP: failed to solve with frontend dockerfile.v0: failed to create LLB definition: dockerfile parse error line 3: unknown instruction: FRUM."),
    "nothing": ("", "STEP: no reason given."),
}  # fmt: skip


@pytest.mark.parametrize("what", WORDS)
def test_what_a_failed_build_comes_to(what: str) -> None:
    text, remedy = WORDS[what]
    said = explain(text.splitlines(), "STEP")
    assert said.startswith(remedy)
    assert "\n" not in said


def test_passwords_in_addresses_are_masked() -> None:
    assert (
        builder.masked("from https://me:hunter2@pypi.example/x and http://tok@h/")
        == "from https://***@pypi.example/x and http://***@h/"
    )
    assert (
        builder.masked("mail me@h.example, see https://h.example/@x") == "mail me@h.example, see https://h.example/@x"
    )


def test_a_request_does_not_show_its_secrets() -> None:
    request = Request(Image.debian_slim(), COMMITTED, "debian:12", {}, {"settings": b"hunter2"})
    assert "hunter2" not in repr(request)


def test_a_request_hands_on_the_proxies_and_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in builder.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://p.example")
    request = Request(Image.debian_slim(), COMMITTED, "mine:1", {})
    assert request.arguments == {"https_proxy": "http://p.example", "BASE": "mine:1"}
    forced = [
        Request(Image.debian_slim().force_build(), COMMITTED, "mine:1", {}).arguments["FRACTAL_FORCE"] for _ in range(2)
    ]
    assert forced[0] != forced[1]


@pytest.mark.parametrize(("events", "failure"), [
    ([{"stream": "Step 1/2 : RUN a\n"}, {"stream": " ---> Running in 01\n"}, {"aux": {"ID": "sha256:1"}}], None),
    ([{"stream": "Step 1/2 : RUN a\n"}, {"stream": "oh no\n"}, {"error": "The command '/bin/sh -c a' returned a non-zero code: 3"}], r"failed: RUN a: oh no\. The whole story: "),
    ([{"stream": "Step 1/2 : COPY a b\n"}, {"error": "no space left on device\nmore", "errorDetail": {}}], "disk is full"),
])  # fmt: skip
def test_the_old_builders_events(events: list[dict[str, object]], failure: str | None, tmp_path: Path) -> None:
    if failure:
        with pytest.raises(BuildError, match=failure):
            builder.follow(events, "test", tmp_path / "log")
    else:
        assert builder.follow(events, "test", tmp_path / "log") == ("sha256:1", 1)
    assert (tmp_path / "log").read_text().startswith("Step 1/2")


# --- the configuration of a built image: an inspection and a history as engine 20.10.24 tells them, newest first

ATTRS = {
    "Architecture": "arm64", "Variant": "v8", "Os": "linux", "Created": "2026-11-25T12:00:00Z", "RootFS": {"Type": "layers", "Layers": ["sha256:a", "sha256:b", "sha256:c"]},
    "Config": {"Hostname": "", "User": "7", "Env": ["A=1"], "Cmd": None, "Healthcheck": {"Test": ["CMD-SHELL", "true"]}, "OnBuild": ["RUN x"], "Labels": {"b": "2", "a": "1"}},
}  # fmt: skip


def history(*lines: tuple[int, str]) -> list[dict[str, object]]:
    return [
        {"Id": "<missing>", "Created": 1, "CreatedBy": by, "Tags": None, "Size": size, "Comment": ""}
        for size, by in reversed(lines)
    ]


@pytest.mark.parametrize(("lines", "empty"), [
    ([(77, ""), (0, "WORKDIR /tmp"), (0, "RUN /bin/sh -c true # buildkit"), (0, "ENV A=1"), (0, 'HEALTHCHECK &{["CMD-SHELL" "true"]}')], [3, 4]),
    ([(77, ""), (0, "/bin/sh -c #(nop) WORKDIR /tmp"), (5, "/bin/sh -c echo"), (0, "/bin/sh -c #(nop)  ONBUILD RUN true"), (52, "/bin/sh -c #(nop) COPY file:6 in /x")], [1, 3]),
])  # fmt: skip
def test_a_pinned_configuration_keeps_what_counts(lines: list[tuple[int, str]], empty: list[int]) -> None:
    config = build.pinned_config(ATTRS, history(*lines))
    assert config["config"] == {
        key: ATTRS["Config"][key] for key in ("User", "Env", "Healthcheck", "OnBuild", "Labels")
    }  # type: ignore[index]
    assert (config["architecture"], config["variant"], config["created"]) == ("arm64", "v8", build.EPOCH)
    assert [i for i, line in enumerate(config["history"]) if "empty_layer" in line] == empty
    assert "2026" not in str(config)


def test_a_history_that_does_not_fit_is_told_in_short() -> None:
    config = build.pinned_config(ATTRS, history((77, "one"), (5, "two")))
    assert len(config["history"]) == 3


def test_an_engines_error_without_the_http() -> None:
    error = docker.errors.APIError(
        "500 Server Error for http+docker://x", explanation="Get https://r: dial tcp: no route.\nmore"
    )
    assert build.first_line(error) == "Get https://r: dial tcp: no route"
