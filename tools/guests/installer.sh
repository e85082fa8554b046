# An unattended installer of Debian 12, controlled by an answer file: the content of an httpDirectory from which a machine is
# installed over the network. The result is a directory:
#
#   linux, initrd    Debian's kernel, and the installer: an initramfs of busybox, sfdisk and mke2fs (installer/init, install)
#   debian.tar.zst   the system to install: systemd, OpenSSH, sudo, GRUB for BIOS and UEFI
#   ipxe.iso         from Debian's package ipxe, unchanged: boots with BIOS and UEFI, and has a prompt
#
# Sourced by make. Uses: early.sh

. "$here/early.sh"
root=$work/root   # the system to install
tools=$work/tools # the packages of the installer's own programs, unpacked but not configured
early=$work/early # the initramfs
files=$work/files
guest=$work/guest
mkdir "$files" "$guest"

packages=systemd-sysv,udev,dbus,libpam-systemd,systemd-resolved,procps,kmod,iproute2,netbase,openssh-server,sudo
packages=$packages,initramfs-tools,lz4,linux-image-amd64,e2fsprogs,fdisk,grub-pc-bin,grub-efi-amd64-bin,grub2-common,efibootmgr

cat >"$files/sources" <<LIST
deb $mirror/debian $suite main
deb $mirror/debian $suite-updates main
deb $mirror/debian-security $suite-security main
LIST

# Documentation, the hardware database and most kernel modules are excluded, because no test needs them, and a small archive is
# fetched and unpacked quickly.
modules='/lib/modules/*/kernel'
options=()
for path in '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/doc/*' '/usr/share/info/*' '/lib/udev/hwdb.d/*' '/usr/lib/udev/hwdb.d/*' \
    "$modules/sound/*" "$modules/drivers/*" "$modules/net/*" "$modules/fs/*" "$modules/arch/x86/kvm/*" "$modules/lib/test*"; do
    options+=("--dpkgopt=path-exclude=$path")
done
for path in net/ipv4 net/ipv6 net/netfilter net/packet net/core net/bridge net/802 net/llc net/sched \
    fs/ext4 fs/jbd2 fs/mbcache fs/fat fs/isofs fs/nls fs/efivarfs fs/configfs fs/autofs fs/fuse fs/overlayfs fs/binfmt fs/pstore \
    drivers/acpi drivers/ata/ahci drivers/ata/libahci drivers/ata/libata drivers/ata/ata_ drivers/block/virtio_blk drivers/block/loop drivers/cdrom \
    drivers/char drivers/firmware drivers/hid/hid drivers/hid/usbhid drivers/input/evdev drivers/misc/pvpanic drivers/net/ethernet/8390 \
    drivers/net/ethernet/amd/pcnet32 drivers/net/ethernet/intel/e1000 drivers/net/ethernet/realtek drivers/net/mii drivers/net/net_failover \
    drivers/net/virtio_net drivers/pps drivers/ptp drivers/scsi/scsi_ drivers/scsi/sd_mod drivers/scsi/sr_mod drivers/scsi/virtio_scsi \
    drivers/usb/common drivers/usb/core drivers/usb/host drivers/usb/storage drivers/virtio drivers/watchdog/i6300esb; do
    options+=("--dpkgopt=path-include=$modules/$path*")
done

mkdir "$files/initramfs"
printf 'MODULES=list\nCOMPRESS=lz4\nFSTYPE=ext4\n' >"$files/initramfs/rudder"
cat >"$files/hook" <<'HOOK'
#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules ext4 crc32c_intel crc32c_generic sd_mod virtio_pci virtio_blk virtio_scsi ahci ata_piix ata_generic \
    usb-storage uas xhci-pci ehci-pci uhci-hcd ohci-pci
HOOK
chmod 755 "$files/hook"

mmdebstrap --mode=root --variant=minbase --include="$packages" "${options[@]}" \
    --dpkgopt=force-unsafe-io --aptopt='Acquire::Retries "3"' \
    --setup-hook='mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/etc/initramfs-tools/hooks"' \
    --setup-hook="cp '$files/initramfs/rudder' \"\$1/etc/initramfs-tools/conf.d/rudder\"" \
    --setup-hook="cp '$files/hook' \"\$1/etc/initramfs-tools/hooks/rudder\"" \
    "$suite" "$root" "$files/sources"
mmdebstrap --mode=root --variant=extract --include=busybox-static,fdisk,e2fsprogs,zstd,ipxe --aptopt='Acquire::Retries "3"' \
    --extract-hook="ls \"\$1/var/cache/apt/archives\" >'$work/packages'" "$suite" "$tools" "$files/sources"
chroot "$root" dpkg-query -W >>"$work/packages"
kernel=$(basename "$root"/lib/modules/*)

cp "$root/boot/vmlinuz-$kernel" "$guest/linux"
cp -L "$tools/usr/lib/ipxe/ipxe.iso" "$guest/ipxe.iso"

# The installer.
early_programs "$tools" "$early" sh awk basename blockdev cat chmod chroot cp cut date dd depmod echo find findfs grep gzip head ip kill ln ls \
    mkdir mkdosfs modprobe mount mv od poweroff printf reboot rm sed seq sleep sort stat stty sync tail tar tee test touch tr udhcpc umount \
    wc wget xargs
mkdir -p "$early/target" "$early/tmp" "$early/run" "$early/etc"
copy_programs "$tools" "$early" /sbin/sfdisk /sbin/mke2fs /usr/bin/zstd
cp "$tools/etc/mke2fs.conf" "$early/etc/"
for name in init install udhcpc; do install -m 755 "$here/installer/$name" "$early/$name"; done
early_modules "$root" "$early" "$kernel" ext4 crc32c_generic crc32c_intel vfat nls_cp437 nls_ascii nls_utf8 efivarfs \
    virtio_pci virtio_blk virtio_scsi virtio_net virtio_rng sd_mod ahci ata_piix ata_generic e1000 e1000e 8139cp pcnet32 ne2k-pci af_packet
rm -rf "$root/trimmed"
pack_early "$early" "$guest/initrd"

# The system to install. The installer writes everything that differs between machines.
write() { # write PATH: writes standard input to this file of the system.
    mkdir -p "$(dirname "$root$1")"
    cat >"$root$1"
}
rm -f "$root/etc/dpkg/dpkg.cfg.d/"*unsafe* "$root/etc/hostname" "$root/etc/ssh/ssh_host_"* "$root/etc/resolv.conf"
ln -s ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root"/etc/apt/sources.list.d/*
cp "$files/sources" "$root/etc/apt/sources.list"
printf 'LANG=C.UTF-8\n' | write /etc/default/locale
write /etc/systemd/network/99-any.network <<CFG
[Match]
Type=ether

[Network]
DHCP=yes
CFG
printf 'UseDNS no\n' | write /etc/ssh/sshd_config.d/10-rudder.conf
printf '%%sudo ALL=(ALL:ALL) NOPASSWD: ALL\n' | write /etc/sudoers.d/installer
chmod 440 "$root/etc/sudoers.d/installer"
printf 'blacklist %s\n' pcspkr i2c_piix4 psmouse joydev iTCO_wdt lpc_ich aesni_intel ghash_clmulni_intel parport_pc bochs |
    write /etc/modprobe.d/rudder.conf
chroot "$root" systemctl --quiet enable systemd-networkd.service systemd-resolved.service ssh.service
chroot "$root" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-networkd-wait-online.service
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old "$root"/var/log/*.log "$root"/tmp/* \
    "$root"/boot/System.map-*
tar -C "$root" --sort=name --numeric-owner --one-file-system -c . | zstd -q -T0 -12 -o "$guest/debian.tar.zst"
