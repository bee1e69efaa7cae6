"""Images' layers on an attached file system, for the next instance in the region.

A registry on the instance's loopback keeps them there, for as long as the instance lives. Images go into it in the
background: a laptop may sleep meanwhile, and what an instance has not finished when it ends, a later one sends again.
"""

from pathlib import PurePosixPath

import docker
import docker.errors

from fractal.cloud.remote_host import Remote, script
from fractal.console import note
from fractal.images import remote_engine
from fractal.images.recipes import Recipe

FOLDER = "layers"  # below Fractal's on the file system
START_TIMEOUT_S = 60.0
# The registry's own image lies there, too: where no public registry answers, it would be sent to each instance.
LOAD = '[ ! -e "$2" ] || $1 inspect fractal-layers > /dev/null 2>&1 || $1 load -q -i "$2"'
SAVE = '[ -e "$2" ] || { $1 save "$3" > "$2.new" && mv "$2.new" "$2"; }'


def start(remote: Remote, sudo: str, program: str, folder: str) -> str:
    """Start the registry unless it runs; its repository as the engine there calls it, as "127.0.0.1:32768/fractal".

    `sudo`, `program`: the docker command there; `folder`: Fractal's on the file system. Raises RemoteError,
    RemoteEngineError, SshError.
    """
    command = f"{sudo} {program}".strip()
    platform = remote.check("ask its engine", "$1 version --format '{{.Server.Os}}/{{.Server.Arch}}'", command).strip()
    engine = remote_engine.Engine(command, platform)
    layers = PurePosixPath(folder) / FOLDER
    archive = str(layers / f"registry-{platform.replace('/', '-')}.tar")
    remote.run(LOAD, command, archive)
    image = remote_engine.ensure_registry_image(remote.link, engine, lambda text: note(text, "lambda"))
    arguments = (sudo, program, image, str(layers))
    port = remote.check("keep layers", script("layer_registry"), *arguments, timeout_s=START_TIMEOUT_S).split()[-1]
    remote.run(SAVE, command, archive, image)
    return f"127.0.0.1:{port.rpartition(':')[2]}/fractal"


def tag(recipe: Recipe) -> str:
    """The tag of a finished image; the one that later builds take layers from is called KEY-PROCESSOR."""
    return recipe.name.removeprefix("fractal-").replace(":", "-")


def take(client: docker.DockerClient, repository: str, recipe: Recipe) -> bool:
    """Pull the recipe's image from the registry and give it its name; whether it was there."""
    try:
        image = client.images.pull(repository, tag=tag(recipe))
    except docker.errors.APIError:
        return False
    image.tag(*recipe.name.split(":"))
    client.images.remove(f"{repository}:{tag(recipe)}", noprune=True)
    return True


def keep(remote: Remote, client: docker.DockerClient, sudo: str, program: str, repository: str, recipe: Recipe) -> None:
    """Begin to push the recipe's image, and the one that tells builders its layers, to the registry."""
    client.images.get(recipe.name).tag(repository, tag(recipe))
    names = (f"{repository}:{tag(recipe)}", f"{repository}:{recipe.key}-{recipe.processor}")
    remote.check("keep layers", script("keep_layers"), sudo, program, *names)
