"""A federation on one machine: a superlink, three supernodes, a run; then all of it ends.

    python extras/flower/demo.py                # patterns, three clients, three rounds
    python extras/flower/demo.py 'rounds=10'    # other values of the run config

As between machines, TLS is on and every node has a registered key. A new folder runs/flower-*/
takes keys, logs and Flower's state. Ctrl-C ends everything too.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

APP = Path(__file__).resolve().parent
ROOT = APP.parent.parent  # data.py to train.py
STARTED = []  # every process that is to be ended


def prepare(folder, clients):
    """Keys, and the configuration of the flwr command -> the address of the superlink."""
    keys = ["bash", f"{APP}/keys.sh", str(folder), "127.0.0.1", str(clients)]
    subprocess.run(keys, check=True, capture_output=True)
    address = f"127.0.0.1:{free_port()}"
    connection = f'address = "{address}"\nroot-certificates = "{folder}/server.pem"\n'
    text = f'[superlink]\ndefault = "demo"\n[superlink.demo]\n{connection}'
    (folder / "config.toml").write_text(text)
    return address


def free_port():
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(folder, path=ROOT):
    """Flower's state in the folder, no telemetry, the project's files to be found."""
    own = {"FLWR_HOME": str(folder), "PYTHONPATH": str(path), "FLWR_TELEMETRY_ENABLED": "0"}
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    own |= {"OMP_NUM_THREADS": "1"}  # the nodes share this machine's cores
    return os.environ | own | {"FLWR_DISABLE_UPDATE_CHECK": "1"}


def start(folder, name, *command, path=ROOT):
    """A process that leads a group of its own and writes folder/name.log."""
    env = environment(folder, path)
    with open(folder / f"{name}.log", "ab") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, env=env, start_new_session=True, **streams)
    STARTED.append(process)
    return process


def start_superlink(folder, address):
    """The server; returns when it listens."""
    host, port = address.split(":")
    flags = f"--host {host} --port {port} --enable-supernode-auth".split()
    flags += [f"--ssl-certfile={folder}/server.pem", f"--ssl-keyfile={folder}/server.key"]
    flags += [f"--ssl-ca-certfile={folder}/server.pem", "--disable-runtime-dependency-installation"]
    process = start(folder, "superlink", "flower-superlink", *flags)
    while socket.socket().connect_ex((host, int(port))):
        if process.poll() is not None:
            raise RuntimeError(f"the superlink has not started: see {folder}/superlink.log")
        time.sleep(0.5)
    return process


def start_node(folder, address, name, node_config, path=ROOT):
    """A client's node, with the key of that name."""
    flags = f"--superlink={address}", f"--root-certificates={folder}/server.pem"
    own = f"--port={free_port()}", f"--auth-supernode-private-key={folder}/{name}"
    command = "flower-supernode", *flags, *own, "--node-config", node_config
    return start(folder, name, *command, path=path)


def flwr(folder, *command, **options):
    """The flwr command: register a node, start a run ..."""
    return subprocess.run(["flwr", *command], env=environment(folder), **options)


def end(folder):
    """End all that was started, and what Flower started from it: its commands name the folder."""
    for sign, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        for process in reversed(STARTED):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
        for process in STARTED:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    STARTED.clear()
    subprocess.run(["pkill", "-KILL", "-f", f"{folder}/"])


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.path.insert(0, str(ROOT))
    from data import dirichlet_split, load_dataset

    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="flower-", dir="runs")).resolve()
    print(f"keys, logs and Flower's state: {folder}/", flush=True)
    split = dirichlet_split(load_dataset("patterns").train_y, 3, alpha=1.0)
    split_file = folder / "split.json"
    split_file.write_text(json.dumps([part.tolist() for part in split]))
    try:
        address = prepare(folder, 3)
        start_superlink(folder, address)
        for k in range(3):
            flwr(folder, "supernode", "register", f"{folder}/client-{k}.pub", check=True)
            node_config = f'client={k} split="{split_file}" dataset="patterns"'
            start_node(folder, address, f"client-{k}", node_config)
        run_config = "clients=3 rounds=3 local-epochs=1 batch-size=64 lr=0.03 width=16"
        run_config += f' dataset="patterns" split-file="{split_file}"'
        run_configs = [f"--run-config={text}" for text in (run_config, *sys.argv[1:])]
        flwr(folder, "run", str(APP), "--stream", *run_configs, check=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"demo.py: {error}; is flwr installed, and openssl and ssh-keygen?")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C does not stop the end
        end(folder)


if __name__ == "__main__":
    main()
