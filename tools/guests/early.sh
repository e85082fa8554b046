# Functions that build an initramfs from busybox and kernel modules. Sourced by the recipes that declare `Uses: early.sh`.

# early_programs ALL EARLY APPLET...: copies busybox from the tree ALL to EARLY, and links the given applets to it.
early_programs() {
    local all=$1 early=$2 applet
    shift 2
    mkdir -p "$early/bin" "$early/sbin" "$early/dev" "$early/proc" "$early/sys"
    cp "$all/bin/busybox" "$early/bin/busybox"
    for applet in "$@"; do ln -s busybox "$early/bin/$applet"; done
    ln -s ../bin/busybox "$early/sbin/modprobe" # where the kernel expects it
}

# early_modules ALL EARLY KERNEL MODULE...: copies these modules and their dependencies from the tree ALL to EARLY.
early_modules() {
    local all=$1 early=$2 kernel=$3 name file
    shift 3
    mkdir -p "$early/lib/modules/$kernel"
    chroot "$all" depmod "$kernel"
    for name in "$@"; do
        chroot "$all" modprobe --set-version "$kernel" --show-depends "$name" 2>/dev/null || echo "missing $name" >&2
    done | awk '$1 == "insmod" {print $2}' | sort -u >"$work/modules"
    while read -r file; do
        mkdir -p "$early$(dirname "$file")"
        # Removes the signatures too, because verifying them takes longer than loading the modules.
        strip --strip-debug -o "$early$file" "$all$file"
    done <"$work/modules"
    cp "$all/lib/modules/$kernel/modules.builtin" "$all/lib/modules/$kernel/modules.order" "$early/lib/modules/$kernel/"
    mkdir -p "$all/trimmed/lib/modules" && cp -a "$early/lib/modules/$kernel" "$all/trimmed/lib/modules/"
    chroot "$all" depmod -b /trimmed "$kernel"
    rm -rf "$early/lib/modules" && mv "$all/trimmed/lib/modules" "$early/lib/modules"
    rm -f "$early/lib/modules/$kernel"/*.bin
}

# pack_early EARLY FILE: packs the tree EARLY into FILE, an initramfs that the kernel can load.
pack_early() {
    (cd "$1" && find . -print0 | LC_ALL=C sort -z | cpio --null --quiet -o -H newc) | lz4 -q -l -9 >"$2"
}

# copy_programs ALL ROOT FILE...: copies programs from the tree ALL to ROOT, with the libraries that they are linked with.
copy_programs() {
    local all=$1 root=$2 file library
    shift 2
    for file in "$@"; do
        mkdir -p "$root$(dirname "$file")"
        cp -aL "$all$file" "$root$file"
        for library in $(chroot "$all" /lib64/ld-linux-x86-64.so.2 --list "$file" 2>/dev/null | grep -oE '/[^ ]+'); do
            mkdir -p "$root$(dirname "$library")"
            cp -L "$all$library" "$root$library"
        done
    done
}
