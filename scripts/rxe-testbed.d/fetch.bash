# Part of scripts/rxe-testbed: what has to be installed or unpacked before a host can boot. QEMU is installed; all else is only
# unpacked into the cache, so that this machine stays without RDMA libraries of its own if it has none.
# shellcheck shell=bash
# The variables of the command line are the script's.
# shellcheck disable=SC2154

cache=${XDG_CACHE_HOME:-$HOME/.cache}/pageferry-rxe
# What the hosts have besides the kernel. The libraries that these depend on come along.
programs=(bash busybox-static dash iproute2 ibverbs-providers ibverbs-utils perftest rdmacm-utils)
# The first version with what is used of it here: stream network devices that connect again.
oldest_qemu=10

need_apt() {
    if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then return; fi
    fail "packages are fetched with apt-get, which this system lacks; it takes Debian 12 or newer"
}

as_root() {
    [ "$(id -u)" -eq 0 ] || fail "$1 has to be installed; do it as root once: sudo scripts/rxe-testbed fetch"
}

update_lists() {
    if [ "$(id -u)" -eq 0 ]; then
        say "reading the lists of packages (apt-get update)"
        apt-get update -qq
    fi
}

qemu_major() {
    local version
    version=$(qemu-system-x86_64 --version 2>/dev/null) || return 1
    [[ $version =~ version\ ([0-9]+) ]] && echo "${BASH_REMATCH[1]}"
}

have_qemu() {
    local major
    major=$(qemu_major) && [ "$major" -ge "$oldest_qemu" ]
}

# The version of QEMU that is offered without asking for a suite.
candidate() { apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: \([0-9]*:\)\{0,1\}\([0-9]*\).*/\2/p'; }

need_qemu() {
    have_qemu && return
    need_apt
    as_root "QEMU $oldest_qemu or newer"
    local codename suite=() offered
    # shellcheck disable=SC1091
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    offered=$(candidate)
    if [ -z "$offered" ]; then
        update_lists
        offered=$(candidate)
    fi
    if [ "${offered:-0}" -lt "$oldest_qemu" ] && [ "$codename" = bookworm ]; then
        suite=(-t bookworm-backports)
        if ! apt-cache policy | grep -q 'n=bookworm-backports'; then
            say "adding the suite bookworm-backports (/etc/apt/sources.list.d/pageferry-backports.list)"
            echo "deb http://deb.debian.org/debian bookworm-backports main" >/etc/apt/sources.list.d/pageferry-backports.list
            update_lists
        fi
    fi
    say "installing QEMU (apt-get install ${suite[*]} qemu-system-x86)"
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "${suite[@]}" --no-install-recommends qemu-system-x86 >/dev/null
    have_qemu || fail "QEMU is of version $(qemu_major || echo none), and this system offers none from $oldest_qemu on"
}

# The newest stock 6.12 kernel; the cloud flavour has no RDMA.
newest_kernel() {
    apt-cache pkgnames linux-image-6.12. | grep -E '^linux-image-6\.12\.[0-9]+(\+[a-z0-9]+)?-amd64$' | sort -V | tail -n 1
}

# The packages of the hosts' programs and of every library below them.
wanted_packages() {
    printf '%s\n' "${programs[@]}"
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
        "${programs[@]}" | grep -E '^lib[a-z0-9.+-]+$' | sort -u
}

fetch_packages() {
    mkdir -p "$cache"
    # One at a time; who waits finds it done.
    exec {lock}>"$cache/lock"
    flock "$lock"
    if $refresh || ! [ -f "$cache/root/complete" ]; then unpack_packages; fi
    exec {lock}>&-
}

unpack_packages() {
    local kernel wanted new=$cache/new deb
    need_apt
    rm -rf "$new"
    mkdir -p "$new/debs" "$new/root"
    if $refresh; then update_lists; fi
    kernel=$(newest_kernel || true)
    if [ -z "$kernel" ]; then
        update_lists
        kernel=$(newest_kernel || true)
    fi
    [ -n "$kernel" ] || fail "apt knows no package linux-image-6.12.*-amd64; run apt-get update, on Debian 12 or newer"
    mapfile -t wanted < <(wanted_packages)
    say "fetching $kernel and ${#wanted[@]} small packages (apt-get download) into $cache"
    # apt's own user cannot write into the cache, which is all that its warning would say.
    (cd "$new/debs" && apt-get download -qq -o APT::Sandbox::User=root "$kernel" "${wanted[@]}") ||
        fail "packages could not be fetched; if apt's lists are old, run apt-get update"
    for deb in "$new"/debs/*.deb; do dpkg-deb -x "$deb" "$new/root"; done
    (cd "$new/debs" && ls) >"$new/root/complete"
    rm -rf "$cache/root" "$cache"/base-*
    mv "$new/root" "$cache/root"
    rm -rf "$new"
}
