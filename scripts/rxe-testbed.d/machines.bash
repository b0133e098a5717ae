# Part of scripts/rxe-testbed: boots the hosts, lets them work and takes in what they leave. They share the directory
# WORK/share with this script; what is in it says rxe-testbed.d/init.
# shellcheck shell=bash
# The variables of the command line are the script's.
# shellcheck disable=SC2154
# Commas belong to QEMU's options.
# shellcheck disable=SC2054

work='' share='' processes=() followers=()

# Only what was started here, by its number. A QEMU dies with this script even when that is killed outright.
clean_up() {
    local code=$?
    trap - EXIT
    trap '' INT TERM
    if [ ${#processes[@]} -gt 0 ]; then
        kill "${processes[@]}" 2>/dev/null || true
        wait "${processes[@]}" 2>/dev/null || true
    fi
    if $keep && [ -n "$work" ]; then
        rm -f "$work/initrd"
        say "the consoles' logs and what the hosts shared are in $work"
    elif [ -n "$work" ]; then
        rm -rf "$work"
    fi
    exit "$code"
}

start_host() {
    local host=$1 rail kernel cpus=2 server=on arguments
    kernel=$(find "$cache/root/boot" -name 'vmlinuz-*' | head -n 1)
    [ "$hosts" = 1 ] || cpus=1
    [ "$host" = 2 ] || server=off,reconnect-ms=200
    arguments=(-nodefaults -no-reboot -display none -m "$memory" -smp "$cpus" -kernel "$kernel" -initrd "$work/initrd"
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 lsm= tsc=reliable no_timer_check testbed.host=$host"
        -fsdev "local,id=share,path=$share,security_model=none" -device virtio-9p-pci,fsdev=share,mount_tag=host)
    case $accel in
        tcg) arguments+=(-accel "tcg,thread=multi" -cpu max) ;;
        kvm) arguments+=(-accel kvm -cpu host) ;;
    esac
    if [ "$hosts" = 2 ]; then
        for ((rail = 0; rail < rails; rail++)); do
            arguments+=(-netdev "stream,id=rail$rail,server=$server,addr.type=unix,addr.path=$work/rail$rail"
                -device "virtio-net-pci,netdev=rail$rail,mac=52:54:00:78:0$rail:0$host,host_mtu=$mtu")
        done
    fi
    mkfifo "$work/monitor$host.in" "$work/monitor$host.out"
    arguments+=(-chardev "pipe,id=monitor,path=$work/monitor$host" -mon chardev=monitor,mode=readline)
    if [ "$command" = shell ] && [ "$host" = 1 ]; then
        arguments+=(-chardev stdio,id=console,signal=off -serial chardev:console)
        setpriv --pdeathsig KILL qemu-system-x86_64 "${arguments[@]}" <&3 2>"$work/qemu$host" &
    else
        arguments+=(-serial "file:$work/console$host")
        setpriv --pdeathsig KILL qemu-system-x86_64 "${arguments[@]}" </dev/null >/dev/null 2>"$work/qemu$host" &
    fi
    processes+=($!)
    cat "$work/monitor$host.out" >"$work/monitor$host.log" 2>/dev/null &
}

runs() { kill -0 "${processes[$1]}" 2>/dev/null; }

# follow FILE PREFIX: what is appended to it, on stdout, until host 1 is gone.
follow() {
    if [ -n "$2" ]; then
        tail -c +1 -s 0.1 -f --pid="$3" "$1" | sed -u "s/^/$2/" &
    else
        tail -c +1 -s 0.1 -f --pid="$3" "$1" &
    fi
    followers+=($!)
}

# What `wire` asks for: both ends of a cable.
serve_wires() {
    local request rail state host
    for request in "$share"/wire/*.request; do
        [ -e "$request" ] || continue
        read -r rail state <"$request" || true
        if [[ "$rail $state" =~ ^[01]\ (on|off)$ ]]; then
            for ((host = 1; host <= hosts; host++)); do
                if runs $((host == 1 ? first : second)); then echo "set_link rail$rail $state" >"$work/monitor$host.in"; fi
            done
        fi
        rm -f "$request"
    done
}

# Why nothing came of it: the end of each console.
show_consoles() {
    local host
    for ((host = 1; host <= hosts; host++)); do
        [ ! -s "$work/qemu$host" ] || sed "s/^/host $host, QEMU: /" "$work/qemu$host" >&2
        [ ! -s "$work/console$host" ] || tail -n 25 "$work/console$host" | tr -d '\r' | sed "s/^/host $host, console: /" >&2
    done
}

# Until host 1 has ended; 124 when that takes too long.
await_end() {
    local told=false
    while runs "$first"; do
        serve_wires
        if ! $told && [ -s "$share/booted" ]; then
            told=true
            [ "$command" = shell ] || say "booted after $SECONDS s"
        fi
        # Host 2 may end when the command wants it to, but not before that began.
        if [ -e "$share/failed" ] || { ! $told && [ "$hosts" = 2 ] && ! runs "$second"; }; then return 125; fi
        [ "$SECONDS" -lt "$limit" ] || return 124
        # A pause that starts no process; nothing is ever written there.
        read -rt 0.1 -u "$pause" || true
    done
}

bring_back() {
    local host
    [ ! -s "$share/get-errors" ] || sed 's/^/rxe-testbed: --get: /' "$share/get-errors" >&2
    for host in 1 2; do
        [ -d "$share/get/$host" ] || continue
        mkdir -p "$to"
        cp -a "$share/get/$host/." "$to/"
    done
    [ ! -s "$share/get-errors" ]
}

run_machines() {
    local result=0 code=125 first second=0 why=''
    SECONDS=0
    work=$(mktemp -d "${TMPDIR:-/tmp}/rxe-testbed.XXXXXX")
    share=$work/share
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    mkfifo "$work/pause"
    exec {pause}<>"$work/pause" 3<&0
    mkdir -p "$share"/jobs/1 "$share/wire" "$share/get"
    [ "$hosts" = 1 ] || mkdir "$share/jobs/2"
    touch "$share/stdout" "$share/stderr" "$share/on2"
    for get in "${gets[@]}"; do echo "$get"; done | sed 's/^\//1:\//' >"$share/gets"
    make_initrd "$work"
    say "booting $hosts host(s) with $rails rail(s), MTU $mtu, $memory MiB each ($accel)"
    if [ "$hosts" = 2 ]; then
        second=${#processes[@]}
        start_host 2
    fi
    first=${#processes[@]}
    start_host 1
    if [ "$command" = run ]; then
        follow "$share/stdout" '' "${processes[$first]}"
        follow "$share/stderr" '' "${processes[$first]}" >&2
        [ -z "$on2" ] || follow "$share/on2" 'host 2: ' "${processes[$first]}" >&2
    fi
    await_end || result=$?
    if [ "$result" -ne 0 ]; then
        kill "${processes[$first]}" 2>/dev/null || true
        wait "${processes[$first]}" 2>/dev/null || true
    fi
    [ ${#followers[@]} -eq 0 ] || wait "${followers[@]}" || true
    if [ -s "$share/exit" ]; then
        read -r code <"$share/exit"
        bring_back || [ "$code" -ne 0 ] || code=125
    elif [ "$result" -eq 124 ]; then
        show_consoles
        echo "scripts/rxe-testbed: the time of $limit s is up" >&2
        code=124
    else
        show_consoles
        [ ! -s "$share/failed" ] || read -r why <"$share/failed"
        echo "scripts/rxe-testbed: a host ended before the command did${why:+: $why}" >&2
    fi
    say "done after $SECONDS s"
    exit "$code"
}
