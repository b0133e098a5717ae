# Part of scripts/rxe-testbed: --native, with the rdma_rxe of the kernel that runs here. One host only: rxe takes packets from the
# first network namespace alone, so that two namespaces cannot be two hosts.
# shellcheck shell=bash
# The variables of the command line are the script's.
# shellcheck disable=SC2154

made=0 native_tools=''

# Every reason why it cannot be done here, before anything is made.
check_native() {
    [ "$command" = run ] || usage_error "--native goes with run"
    [ "$hosts" = 1 ] || usage_error "--native has one host: rxe takes packets from the first network namespace alone"
    [ "${#puts[@]}${#gets[@]}" = 00 ] ||
        usage_error "--put and --get are for virtual machines; with --native the files are here already"
    [ "$(id -u)" -eq 0 ] || fail "--native makes interfaces and RDMA devices, which is root's: run it as root"
    [ -d /sys/module/rdma_rxe ] || modprobe -q rdma_rxe 2>/dev/null ||
        fail "this kernel ($(uname -r)) has no module rdma_rxe; leave --native out to run a kernel that has it in a virtual machine"
    command -v rdma >/dev/null || fail "ip and rdma are needed; install iproute2"
    local rail
    for ((rail = 0; rail < rails; rail++)); do
        if [ -e "/sys/class/net/pf$rail" ] || [ -e "/sys/class/infiniband/rxe$rail" ]; then
            fail "there is a pf$rail or rxe$rail already, of another testbed perhaps; remove it (ip link del pf$rail)"
        fi
    done
}

# The RDMA device goes with its interface.
take_native_down() {
    local code=$? rail
    trap - EXIT
    for ((rail = 0; rail < made; rail++)); do ip link del "pf$rail" 2>/dev/null || true; done
    rm -rf "$native_tools"
    exit "$code"
}

make_native_rails() {
    local rail
    for ((rail = 0; rail < rails; rail++)); do
        ip link add "pf$rail" mtu "$mtu" type veth peer name "pf$rail-end" mtu "$mtu"
        made=$((rail + 1))
        ip link set "pf$rail-end" up
        ip address add "10.78.$rail.1/24" dev "pf$rail"
        ip link set "pf$rail" up
        rdma link add "rxe$rail" type rxe netdev "pf$rail" || fail "soft-RoCE does not start on pf$rail"
    done
}

# `on` and `wire` as the virtual machines have them.
make_native_tools() {
    native_tools=$(mktemp -d "${TMPDIR:-/tmp}/rxe-testbed.XXXXXX")
    cat >"$native_tools/on" <<'TOOL'
#!/bin/sh
[ "${1:-}" = 1 ] || { echo "on: there is only host 1, with a command" >&2; exit 2; }
shift
exec sh -c "$*"
TOOL
    cat >"$native_tools/wire" <<'TOOL'
#!/bin/sh
case ${1:-}/${2:-} in
    [01]/off) exec ip link set "pf$1-end" down ;;
    [01]/on) exec ip link set "pf$1-end" up ;;
esac
echo "wire: it takes the number of a rail, and off or on" >&2
exit 2
TOOL
    chmod +x "$native_tools/on" "$native_tools/wire"
}

run_natively() {
    local program code=0
    check_native
    SECONDS=0
    trap take_native_down EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    say "making $rails rail(s), MTU $mtu, in this kernel ($(uname -r))"
    make_native_rails
    make_native_tools
    program=$(find_program)
    PATH=$native_tools:${program:+$(dirname "$program"):}$PATH timeout "$limit" sh -c "$(script_of "${words[@]}")" || code=$?
    # Some versions of timeout(1) end with the signal's code.
    if [ "$SECONDS" -ge "$limit" ]; then
        echo "scripts/rxe-testbed: the time of $limit s is up" >&2
        code=124
    fi
    exit "$code"
}
