#!/bin/sh
# Images under the tags of deploy/images.lock for an engine that reaches no registry, out of Debian's packages: a
# Debian root with Python, HAProxy, Prometheus and Alertmanager, and a page in Grafana's place that is none. The label
# ultrafuser.stand-in says so of each. Needs mmdebstrap, docker with buildx, and a Debian archive.
set -eu
cd "$(dirname "$0")/../../deploy"
# shellcheck source=/dev/null
. ./images.lock
release=bookworm
archive="${DEBIAN_ARCHIVE:-http://deb.debian.org/debian}"

# shellcheck disable=SC2016  # $1 is for mmdebstrap's own shell
mmdebstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    --customize-hook='ln -s /usr/bin/python3 "$1/usr/local/bin/python"' $release - "deb $archive $release main" |
    docker import --change 'LABEL ultrafuser.stand-in="Debian and its Python"' - "$PYTHON_IMAGE"

docker build --tag "$PROMETHEUS_IMAGE" - <<END
FROM $PYTHON_IMAGE
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus wget && mkdir -p /prometheus && chown nobody /prometheus
LABEL ultrafuser.stand-in="Debian's prometheus"
USER nobody
VOLUME /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
END

docker build --tag "$ALERTMANAGER_IMAGE" - <<END
FROM $PYTHON_IMAGE
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus-alertmanager wget && mkdir -p /alertmanager && chown nobody /alertmanager
LABEL ultrafuser.stand-in="Debian's prometheus-alertmanager"
USER nobody
VOLUME /alertmanager
ENTRYPOINT ["/usr/bin/prometheus-alertmanager"]
END

docker build --tag "$GRAFANA_IMAGE" - <<END
FROM $PYTHON_IMAGE
RUN apt-get update && apt-get install --yes --no-install-recommends wget \
    && useradd --uid 472 --gid 0 grafana && mkdir -p /var/lib/grafana/api && touch /var/lib/grafana/api/health && chown -R grafana /var/lib/grafana
LABEL ultrafuser.stand-in="no Grafana: a folder with an empty /api/health"
USER 472
VOLUME /var/lib/grafana
# What Grafana would read must be readable, and the password no empty file.
ENTRYPOINT ["sh", "-ec", "test -s \"\$GF_SECURITY_ADMIN_PASSWORD__FILE\"; cat \"\$GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH\" /etc/grafana/provisioning/*/* >/dev/null; cd /var/lib/grafana; exec python -m http.server 3000"]
END

docker build --tag "$HAPROXY_IMAGE" - <<END
FROM $PYTHON_IMAGE
RUN apt-get update && apt-get install --yes --no-install-recommends haproxy \
    && usermod --uid 99 haproxy && groupmod --gid 99 haproxy
LABEL ultrafuser.stand-in="Debian's haproxy"
STOPSIGNAL SIGUSR1
USER haproxy
ENTRYPOINT ["/usr/sbin/haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
END
