#!/usr/bin/env bash
# Every chapter, top to bottom, in an environment like Colab's: Python 3.13 of a Debian trixie root, torch and
# the common packages there before, one notebook alone in an empty folder, the core from a wheel.
#
# Run as root, with debootstrap and network: tests/colab/like_colab.sh [folder for the root] [chapters]
# It fails if a chapter fails, if the first cell takes 60 s or more or changes a package that was there, or if no
# picture or table stands 3 minutes after the start. What it measured goes to ROOT/work/colab.json.
set -euo pipefail
repository=$(realpath "$(dirname "$0")/../..")
root=${1:-/var/tmp/like-colab}
shift || true
chapters=${*:-$(basename -s .ipynb "$repository"/book/*.ipynb)}

if [ ! -e "$root/ready" ]; then
  debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,python3-torch,git,ca-certificates \
    trixie "$root" https://deb.debian.org/debian
  cp /etc/resolv.conf "$root/etc/"
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  chroot "$root" python3 -m venv --system-site-packages /opt/colab
  # What Colab has besides torch; numpy and torch are Debian's and stay.
  chroot "$root" env PIP_NO_CACHE_DIR=1 /opt/colab/bin/pip install --quiet \
    "numpy==$(chroot "$root" python3 -c 'import numpy; print(numpy.__version__)')" \
    'pandas==2.2.*' 'scipy>=1.16' scikit-learn scikit-image matplotlib seaborn statsmodels lightgbm numba \
    'plotly==5.24.*' 'ipykernel==6.*' ipython nbclient tqdm requests openpyxl pooch pyyaml rich typer joblib \
    pillow psutil filelock sympy==1.13.1  # the one that this torch asks for
  mv "$root/opt/colab" "$root/opt/as-it-was"
  touch "$root/ready"
fi

rm -rf "$root/work"
mkdir -p "$root/work/wheel"
(cd "$repository" && git archive HEAD) | tar -x -C "$root/work/wheel"
rm -rf "$root/opt/colab"
cp -al "$root/opt/as-it-was" "$root/opt/colab"
chroot "$root" /opt/colab/bin/pip wheel --quiet --no-deps --wheel-dir /work /work/wheel
rm -rf "$root/work/wheel"
cp "$repository/tests/colab/execute.py" "$root/work/"
mount -t proc proc "$root/proc"
trap 'umount "$root/proc"' EXIT
wheel=$(cd "$root" && echo work/*.whl)
for chapter in $chapters; do
  mkdir "$root/work/$chapter"
  cp "$repository/book/$chapter.ipynb" "$root/work/$chapter/"
  rm -rf "$root/opt/colab" # each chapter as on a fresh machine
  cp -al "$root/opt/as-it-was" "$root/opt/colab"
  chroot "$root" env -i HOME=/root PATH=/opt/colab/bin:/usr/bin:/bin LANG=C.UTF-8 \
    COVIDMTL_INSTALL="file:///$wheel" /opt/colab/bin/python /work/execute.py "$chapter"
done
