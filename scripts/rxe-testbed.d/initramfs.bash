# Part of scripts/rxe-testbed: what a host boots from. The base (kernel modules, programs, init) is made once and kept; what one
# run puts in is a second archive behind it, which the kernel unpacks over the first.
# shellcheck shell=bash
# The variables of the command line are the script's.
# shellcheck disable=SC2154

# In the order that they are wanted in; what each depends on goes before it. rxe needs crc32_generic and does not say so.
modules=(
    9pnet_virtio 9p crc32_generic udp_tunnel ip6_udp_tunnel ib_core ib_uverbs rdma_rxe rdma_ucm veth virtio_net
)
# Loaded beside the others, which they do not need.
modules_later=(kvm ccp kvm-amd kvm-intel sch_netem sch_fq sch_tbf sch_ingress cls_u32 act_gact)
host_programs=(
    bash dash ip rdma tc ss bridge ib_write_bw ib_write_lat ib_read_bw ib_send_bw ibv_devinfo ibv_devices ibv_rc_pingpong rping
)

busybox() { "$cache/root/bin/busybox" "$@"; }

# A skeleton with /usr merged, as Debian has it.
make_skeleton() {
    local directory
    mkdir -p "$1"/usr/{bin,lib/x86_64-linux-gnu,lib64,sbin} "$1"/{etc/testbed,root,modules,proc,sys,dev,tmp,run,host}
    for directory in bin lib lib64 sbin; do ln -sfn "usr/$directory" "$1/$directory"; done
}

# put_program STAGE FILE NAME: and the libraries that it needs, from the unpacked packages or else from this machine.
put_program() {
    local stage=$1 file=$2 name=$3 libraries=$cache/root/lib/x86_64-linux-gnu:$cache/root/usr/lib/x86_64-linux-gnu listed library
    install -D -m 755 "$file" "$stage$name"
    listed=$("$cache/root/lib64/ld-linux-x86-64.so.2" --list --library-path "$libraries" "$file" 2>/dev/null) || return 0
    if [[ $listed == *"not found"* ]]; then
        fail "$file needs libraries that are not here: $(sed -n 's/ => not found.*//p' <<<"$listed" | tr -d '\t' | tr '\n' ' ')"
    fi
    while read -r library; do
        [ -e "$stage/usr/lib/x86_64-linux-gnu/${library##*/}" ] ||
            install -m 755 "$library" "$stage/usr/lib/x86_64-linux-gnu/"
    done < <(sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' <<<"$listed")
}

find_module() { find "$cache/root/lib/modules" -name "$1.ko*" -o -name "${1//_/-}.ko*" -o -name "${1//-/_}.ko*" | head -n 1; }

# add_module STAGE LIST NAME: unpacked, and in the list behind what it depends on.
add_module() {
    local stage=$1 list=$2 name=${3//-/_} file dependency
    [ ! -e "$stage/modules/$name.ko" ] || return 0
    file=$(find_module "$name")
    # Some are built in with one kernel and apart with another.
    [ -n "$file" ] || return 0
    case $file in
        *.xz) busybox xzcat "$file" >"$stage/modules/$name.ko" ;;
        *.zst) zstd -qdc "$file" >"$stage/modules/$name.ko" ;;
        *) cp "$file" "$stage/modules/$name.ko" ;;
    esac
    for dependency in $(tr '\0' '\n' <"$stage/modules/$name.ko" | sed -n 's/^depends=//p' | tr ',' ' '); do
        add_module "$stage" "$list" "$dependency"
    done
    echo "$name" >>"$stage/etc/testbed/$list"
}

archive() { (cd "$1" && find . -mindepth 1 | busybox cpio -o -H newc 2>/dev/null) >"$2"; }

make_base() {
    local stage program file key
    # The kept one is of these packages and of these scripts.
    key=$(cat "$cache/root/complete" "$here"/* | sha256sum)
    base=$cache/base-${key:0:16}.cpio
    [ ! -f "$base" ] || return 0
    say "making the hosts' initial file system"
    stage=$(mktemp -d "$cache/stage.XXXXXX")
    make_skeleton "$stage"
    for program in "${modules[@]}"; do add_module "$stage" modules "$program"; done
    for program in "${modules_later[@]}"; do add_module "$stage" modules-later "$program"; done
    for program in "${host_programs[@]}"; do
        file=$(find "$cache/root/bin" "$cache/root/sbin" "$cache/root/usr/bin" "$cache/root/usr/sbin" -name "$program" 2>/dev/null | head -n 1)
        [ -n "$file" ] || fail "the packages in $cache have no program $program; scripts/rxe-testbed fetch --refresh gets newer ones"
        put_program "$stage" "$file" "/usr/bin/$program"
    done
    install -m 755 "$cache/root/bin/busybox" "$stage/usr/bin/busybox"
    while read -r program; do
        [ -e "$stage/usr/bin/$program" ] || ln -s busybox "$stage/usr/bin/$program"
    done < <(busybox --list)
    # busybox's own shell prefers its applets to programs, of which ip is one.
    ln -sfn dash "$stage/usr/bin/sh"
    mkdir -p "$stage/usr/lib/x86_64-linux-gnu/libibverbs" "$stage/etc/libibverbs.d"
    cp "$cache"/root/usr/lib/x86_64-linux-gnu/libibverbs/librxe-*.so "$stage/usr/lib/x86_64-linux-gnu/libibverbs/"
    cp "$cache/root/etc/libibverbs.d/rxe.driver" "$stage/etc/libibverbs.d/"
    install -m 755 "$cache/root/lib64/ld-linux-x86-64.so.2" "$stage/usr/lib64/"
    install -m 755 "$here/init" "$stage/init"
    install -m 755 "$here/on" "$here/wire" "$here/daemons" "$stage/usr/bin/"
    printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$stage/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$stage/etc/group"
    archive "$stage" "$base.part"
    rm -rf "$stage"
    mv "$base.part" "$base"
}

# put_file STAGE FILE[:PATH]
put_file() {
    local stage=$1 file=${2%%:*} path='' size
    [[ $2 != *:* ]] || path=${2#*:}
    if [ -d "$file" ]; then
        mkdir -p "$stage${path:-/root/$(basename "$file")}"
        cp -a "$file/." "$stage${path:-/root/$(basename "$file")}/"
        return
    fi
    [ -f "$file" ] || fail "--put $2: there is no file $file"
    if [ -x "$file" ]; then
        put_program "$stage" "$file" "${path:-/usr/bin/${file##*/}}"
    else
        install -D -m 644 "$file" "$stage${path:-/root/${file##*/}}"
    fi
    # A debug build is mostly what only a debugger reads, and has to fit into the host's memory.
    size=$(stat -c %s "$file")
    if [ -x "$file" ] && [ "$size" -gt 33554432 ] && command -v strip >/dev/null; then
        strip --strip-debug "$stage${path:-/usr/bin/${file##*/}}" 2>/dev/null || true
    fi
}

# make_initrd WORK: the base and behind it what this run puts in.
make_initrd() {
    local work=$1 stage=$1/stage file program
    make_skeleton "$stage"
    program=$(find_program)
    if [ -n "$program" ]; then
        say "putting in $program"
        put_file "$stage" "$program"
    fi
    for file in "${puts[@]}"; do put_file "$stage" "$file"; done
    printf '%s\n' "hosts=$hosts" "rails=$rails" "mtu=$mtu" "what=$command" >"$stage/etc/testbed/settings"
    if [ "$command" = run ]; then script_of "${words[@]}" >"$stage/etc/testbed/command"; fi
    [ -z "$on2" ] || printf '%s\n' "$on2" >"$stage/etc/testbed/on2"
    archive "$stage" "$work/run.cpio"
    cat "$base" "$work/run.cpio" >"$work/initrd"
    rm -rf "$stage" "$work/run.cpio"
}
