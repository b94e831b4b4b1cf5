"""What deploy/ holds is valid, complete and says what the security rules ask."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
import yaml

from edgeward.cli.main import build

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FOLDERS = ["base", "controller"]


def documents(folder):
    found = []
    for file in sorted((DEPLOY / folder).glob("*.yaml")):
        if file.name != "kustomization.yaml":
            found += [item for item in yaml.safe_load_all(file.read_text()) if item]
    return found


def one(folder, kind):
    (found,) = [item for item in documents(folder) if item["kind"] == kind]
    return found


def validate(*files):
    command = [str(Path(sys.executable).parent / "kubernetes-validate"), "--strict", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def render(folder):
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            return done.stdout
    pytest.skip("neither kustomize nor kubectl is installed; the files themselves are checked all the same")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_valid_and_listed(folder):
    files = sorted(file for file in (DEPLOY / folder).glob("*.yaml") if file.name != "kustomization.yaml")
    done = validate(*files)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = yaml.safe_load((DEPLOY / folder / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [file.name for file in files]


@pytest.mark.parametrize("folder", ["base", "controller", "overlays/gpu"])
def test_what_kustomize_renders_is_valid(folder, tmp_path):
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(render(DEPLOY / folder))
    done = validate(rendered)
    assert done.returncode == 0, done.stdout + done.stderr
    items = list(yaml.safe_load_all(rendered.read_text()))
    namespaced = [
        item for item in items if item["kind"] not in ("Namespace", "ClusterRole", "ClusterRoleBinding")
    ]
    assert {item["metadata"]["namespace"] for item in namespaced} == {"edgeward"}
    if folder == "overlays/gpu":
        pod = next(item for item in items if item["kind"] == "DaemonSet")["spec"]["template"]["spec"]
        assert pod["runtimeClassName"] == "nvidia"
        assert pod["containers"][0]["resources"]["limits"] == {"memory": "1Gi", "nvidia.com/gpu": "1"}


def test_an_unknown_field_would_be_seen(tmp_path):
    document = one("base", "DaemonSet")
    document["spec"]["template"]["spec"]["hostNetwrok"] = True
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(document))
    assert validate(path).returncode != 0


@pytest.mark.parametrize(("folder", "kind"), [("base", "DaemonSet"), ("controller", "Deployment")])
def test_containers_are_confined(folder, kind):
    pod = one(folder, kind)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    for container in pod["containers"] + pod.get("initContainers", []):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
        assert not context.get("privileged")
        assert container["resources"]["requests"]
        assert "memory" in container["resources"]["limits"]
    for container in pod["containers"]:
        assert container["livenessProbe"]
        assert container["startupProbe"]
        assert "runAsUser" not in container["securityContext"]


def test_the_agent_may_get_nodes_and_nothing_else():
    assert one("base", "ClusterRole")["rules"] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}
    ]
    binding = one("base", "ClusterRoleBinding")
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "edgeward-agent", "namespace": "edgeward"}
    ]


def test_the_agent_knows_its_node_and_keeps_its_state():
    pod = one("base", "DaemonSet")["spec"]["template"]["spec"]
    (agent,) = pod["containers"]
    assert {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}} in agent["env"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["state"]["hostPath"] == {"path": "/var/lib/edgeward", "type": "DirectoryOrCreate"}
    assert volumes["enrollment"]["secret"]["secretName"] == "edgeward-enrollment"
    # The token is for enrolment only: the long-running container never sees it.
    assert "enrollment" not in {mount["name"] for mount in agent["volumeMounts"]}


def test_agents_find_each_other_by_a_name_that_has_all_their_addresses():
    service, daemonset = one("base", "Service"), one("base", "DaemonSet")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= daemonset["spec"]["template"]["metadata"]["labels"].items()
    (agent,) = daemonset["spec"]["template"]["spec"]["containers"]
    (port,) = service["spec"]["ports"]
    (opened,) = agent["ports"]
    assert opened["name"] == port["targetPort"]
    name = service["metadata"]["name"]
    assert f"--peers-dns={name}:{port['port']}" in agent["args"]
    assert f"--peers-listen=0.0.0.0:{opened['containerPort']}" in agent["args"]
    # There is one number: the name gives addresses only, so the pods' own port is what is asked.
    assert port["port"] == opened["containerPort"]


@pytest.mark.parametrize("folder", ["base"])
def test_the_agents_arguments_are_ones_it_has(folder):
    (agent,) = one(folder, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    command = typer.main.get_command(build())
    for word in [item for item in agent["args"] if not item.startswith("-")]:
        command = command.commands[word]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {item.partition("=")[0] for item in agent["args"] if item.startswith("-")} <= known


@pytest.mark.parametrize(("image", "folder"), [("agent", "agent"), ("controller", "controller")])
def test_an_image_copies_the_face_and_one_application(image, folder):
    lines = (DEPLOY / "images" / f"{image}.Containerfile").read_text().splitlines()
    copied = {
        line.split()[1].rstrip("/") for line in lines if line.startswith("COPY ") and "--from" not in line
    }
    folders = {name for name in copied if (ROOT / name).is_dir()}
    assert folders == {"edgeward", folder}
    assert any(line.startswith("USER 65532") for line in lines)


def test_the_unit_is_well_formed():
    unit = DEPLOY / "systemd" / "edgeward-agent.service"
    text = unit.read_text()
    for setting in ("Restart=always", "NoNewPrivileges=yes", "ProtectSystem=strict", "User=edgeward"):
        assert setting in text.splitlines()
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
        )
        assert "Unknown" not in done.stderr, done.stderr


@pytest.mark.parametrize("folder", ["agent", "controller"])
def test_an_image_keeps_only_its_own_commands(folder, tmp_path):
    """The build step that narrows pyproject.toml must go on fitting it."""
    recipe = (DEPLOY / "images" / f"{folder}.Containerfile").read_text()
    (command,) = [line.strip(" &\\") for line in recipe.splitlines() if "sed -i" in line]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, timeout=20)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["edgeward", folder]
    assert project["project"]["entry-points"]["edgeward.commands"] == {folder: f"{folder}.commands:register"}
    assert set(project["project"]["optional-dependencies"]) >= {"agent", "controller"}
