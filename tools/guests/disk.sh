# Functions that turn a directory tree into a disk that boots with BIOS and UEFI, including Secure Boot. Sourced by make.
#
# GPT partitions: 1. GRUB's BIOS core image (1 MiB), 2. EFI system partition (FAT), 3. root (ext4), last so that it can grow.

# The fixed layout of the partitions, in sectors of 512 bytes.
core_at=2048
esp_at=4096
esp_sectors=32768
root_at=$((esp_at + esp_sectors))

# little_endian VALUE: prints VALUE as eight bytes, the format of block numbers in GRUB's boot sectors.
little_endian() {
    local n=$1 i
    for i in 1 2 3 4 5 6 7 8; do
        printf '%b' "\\x$(printf '%02x' $((n & 255)))"
        n=$((n >> 8))
    done
}

# put FILE DISK OFFSET [COUNT]: writes FILE (or its first COUNT bytes) to DISK at the byte OFFSET.
put() {
    dd if="$1" of="$2" bs=1M seek="$3" ${4:+count="$4"} oflag=seek_bytes iflag=fullblock${4:+,count_bytes} conv=notrunc status=none
}

# make_disk ROOT GRUB SIZE_MIB UUID EARLY: writes $work/disk.raw. ROOT is the tree of the root file system, and GRUB a tree
# that contains Debian's grub-pc-bin, grub-efi-amd64-signed, shim-signed and grub-mkimage. EARLY are the commands that GRUB
# executes first on BIOS; if empty, GRUB reads /boot/grub/grub.cfg.
make_disk() {
    local root=$1 grub=$2 mib=$3 uuid=$4 early=$5 disk=$work/disk.raw
    local root_sectors=$((mib * 2048 - root_at - 2048))

    rm -f "$disk"
    truncate -s "${mib}M" "$disk"
    sfdisk --quiet "$disk" <<TABLE
label: gpt
start=$core_at, size=$((esp_at - core_at)), type=21686148-6449-6E6F-744E-656564454649
start=$esp_at, size=$esp_sectors, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
start=$root_at, size=$root_sectors, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4
TABLE

    # GRUB does not support some newer ext4 features, so they are disabled.
    mke2fs -q -t ext4 -b 4096 -L root -U "$uuid" -m 1 -O '^metadata_csum_seed,^orphan_file' \
        -E "offset=$((root_at * 512)),lazy_itable_init=0,lazy_journal_init=0,no_copy_xattrs" -J size=16 \
        -d "$root" "$disk" $((root_sectors / 2))k

    # BIOS: the boot sector has the block number of GRUB's core image at offset 0x5c (eight bytes). The first sector of the
    # core image has the block number of the rest twelve bytes before its end. See grub-core/boot/i386/pc/{boot,diskboot}.S.
    mkdir -p "$grub/tmp"
    printf '%s\n' "$early" >"$grub/tmp/early.cfg"
    local modules="biosdisk part_gpt ext2 linux boot minicmd"
    if [ -z "$early" ]; then
        modules="$modules normal configfile echo test search search_fs_uuid search_label serial terminal gzio reboot halt ls cat"
    fi
    # shellcheck disable=SC2086
    chroot "$grub" grub-mkimage -O i386-pc -o /tmp/core.img -p '(,gpt3)/boot/grub' \
        ${early:+-c /tmp/early.cfg} $modules
    put "$grub/usr/lib/grub/i386-pc/boot.img" "$disk" 0 440
    little_endian $core_at >"$work/number"
    put "$work/number" "$disk" $((0x5c))
    put "$grub/tmp/core.img" "$disk" $((core_at * 512))
    little_endian $((core_at + 1)) >"$work/number"
    put "$work/number" "$disk" $((core_at * 512 + 500))

    # UEFI: shim and Debian's signed GRUB, in Debian's directory and at the default path for removable media. Shim's fallback
    # program is left out, because it would write boot entries and restart the machine.
    cat >"$work/efi.cfg" <<CFG
search.fs_uuid $uuid root
set prefix=(\$root)/boot/grub
configfile \$prefix/grub.cfg
CFG
    local esp=$work/esp.img signed=$grub/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed
    rm -f "$esp"
    truncate -s $((esp_sectors * 512)) "$esp"
    mkfs.vfat -F 16 -n ESP "$esp" >/dev/null
    export MTOOLS_SKIP_CHECK=1
    mmd -i "$esp" ::EFI ::EFI/BOOT ::EFI/debian
    mcopy -i "$esp" "$grub/usr/lib/shim/shimx64.efi.signed" ::EFI/BOOT/BOOTX64.EFI
    mcopy -i "$esp" "$signed" ::EFI/BOOT/grubx64.efi
    mcopy -i "$esp" "$grub/usr/lib/shim/shimx64.efi.signed" ::EFI/debian/shimx64.efi
    mcopy -i "$esp" "$signed" ::EFI/debian/grubx64.efi
    mcopy -i "$esp" "$work/efi.cfg" ::EFI/debian/grub.cfg
    put "$esp" "$disk" $((esp_at * 512))
}

# publish_disk: converts $work/disk.raw to the compressed image $work/guest.qcow2, and verifies it.
publish_disk() {
    qemu-img convert -O qcow2 -c -o compression_type=zstd -W -m 4 \
        "$work/disk.raw" "$work/guest.qcow2"
    qemu-img check -q "$work/guest.qcow2"
    qemu-img compare -q "$work/disk.raw" "$work/guest.qcow2"
    rm -f "$work/disk.raw"
}
