"""The gateways that Sluice is compared with: how each is installed and started."""

import getpass
import json
import shutil

from benchmarks.install import SkipTarget, install_from_npm, install_from_pypi
from benchmarks.load import KEY, MODEL, Endpoint
from benchmarks.place import Place, Started
from benchmarks.processes import free_port
from benchmarks.stub import BASE

VLLM_ROUTER = "vllm-router==0.1.17"
SMG = "smg==1.13.0"
LITELLM = "litellm[proxy]<1.109"
PORTKEY = "@portkey-ai/gateway@1.15.2"
# It imports for seconds on a core that it shares.
LITELLM_START_SECONDS = 120.0

NGINX_CONFIG = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  tcp_nodelay on;
  keepalive_timeout 300s;
  keepalive_requests 100000000;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream engine {{
    server {engine};
    keepalive 512;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def start_nginx(place: Place) -> Started:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        raise SkipTarget("nginx is not installed (`apt-get install nginx-light`)")
    port = free_port()
    user = f"user {getpass.getuser()};" if getpass.getuser() == "root" else ""
    config = place.folder / "nginx.conf"
    config.write_text(
        NGINX_CONFIG.format(
            user=user,
            folder=place.folder,
            engine=place.engine_url.removeprefix("http://"),
            port=port,
        )
    )
    url = f"http://127.0.0.1:{port}"
    command = [nginx, "-e", "stderr", "-p", str(place.folder), "-c", str(config)]
    pid = place.processes.start("nginx", command, core=place.cores.gateway, ready=f"{url}/health")
    return Started(Endpoint(url), pid)


def start_vllm_router(place: Place) -> Started:
    binary = install_from_pypi("vllm-router", VLLM_ROUTER, "vllm-router")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(binary), "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", place.engine_url, "--policy", "round_robin"),
        *("--prometheus-port", str(free_port()), "--log-level", "warning"),
    ]
    pid = place.processes.start(
        "vllm-router", command, core=place.cores.gateway, ready=f"{url}/health"
    )
    return Started(Endpoint(url), pid)


def start_smg(place: Place) -> Started:
    binary = install_from_pypi("smg", SMG, "smg")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(binary), "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", place.engine_url, "--policy", "round_robin", "--log-level", "warn"),
        *("--prometheus-port", str(free_port()), "--disable-tokenizer-autoload"),
    ]
    pid = place.processes.start("smg", command, core=place.cores.gateway, ready=f"{url}/readiness")
    # It routes by the names that the engine itself lists.
    return Started(Endpoint(url, model=BASE), pid)


def start_litellm(place: Place) -> Started:
    binary = install_from_pypi("litellm", LITELLM, "litellm")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    parameters = {
        "model": f"openai/{BASE}",
        "api_base": f"{place.engine_url}/v1",
        "api_key": "none",
    }
    # JSON is YAML.
    config = place.folder / "litellm.yaml"
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
                "general_settings": {"master_key": KEY},
            }
        )
    )
    command = [
        *(str(binary), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)),
        *("--num_workers", "1", "--telemetry", "False"),
    ]
    pid = place.processes.start(
        "litellm",
        command,
        core=place.cores.gateway,
        ready=f"{url}/health/liveliness",
        environ={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        limit=LITELLM_START_SECONDS,
    )
    return Started(Endpoint(url), pid)


def start_portkey(place: Place) -> Started:
    node = shutil.which("node")
    if node is None:
        raise SkipTarget("node is not installed (`apt-get install nodejs npm`)")
    script = install_from_npm("portkey", PORTKEY, "@portkey-ai/gateway/build/start-server.js")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [node, str(script), f"--port={port}", "--headless"]
    pid = place.processes.start("portkey", command, core=place.cores.gateway, ready=f"{url}/")
    headers = (
        *Endpoint(url).headers,
        "x-portkey-provider: openai",
        f"x-portkey-custom-host: {place.engine_url}/v1",
    )
    return Started(Endpoint(url, headers), pid)
