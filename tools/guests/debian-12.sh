# A Debian 12 cloud image. It has the parts of Debian's own image that the tests need (cloud-init, OpenSSH, sudo,
# systemd-networkd, BIOS and UEFI), without those that only slow down every boot. Sourced by make.

root=$work/root
uuid=5d0f2c1e-7a64-4a55-9d3c-2f1d2b6a8e12

packages=systemd-sysv,udev,dbus,libpam-systemd,systemd-resolved,systemd-timesyncd,procps,kmod,iproute2,iputils-ping,netbase
packages=$packages,cloud-init,cloud-guest-utils,fdisk,e2fsprogs,openssh-server,openssh-sftp-server,sudo,ca-certificates
packages=$packages,initramfs-tools,lz4,linux-image-amd64,grub-pc-bin,grub-efi-amd64-signed,shim-signed,grub2-common
packages=$packages,less,vim-tiny,wget

# Manual pages, translations, and drivers for hardware that virtual machines do not have are excluded, also from upgrades.
modules='/lib/modules/*/kernel'
excludes=()
for path in '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/doc/*' '/usr/share/info/*' \
    "$modules/sound/*" "$modules/drivers/gpu/*" "$modules/drivers/media/*" "$modules/drivers/infiniband/*" \
    "$modules/drivers/net/wireless/*" "$modules/drivers/isdn/*" "$modules/drivers/staging/*" "$modules/drivers/iio/*" \
    "$modules/drivers/hwmon/*" "$modules/drivers/mtd/*" "$modules/drivers/bluetooth/*" "$modules/net/bluetooth/*" \
    "$modules/net/wireless/*" "$modules/net/mac80211/*" "$modules/drivers/firewire/*" "$modules/drivers/net/can/*" \
    "$modules/drivers/net/ethernet/mellanox/*" "$modules/drivers/net/ethernet/chelsio/*" "$modules/drivers/crypto/*" \
    "$modules/arch/x86/kvm/*" "$modules/drivers/cpufreq/*" "$modules/drivers/edac/*"; do
    excludes+=("--dpkgopt=path-exclude=$path")
done

mkdir "$work/files"
files=$work/files

cat >"$files/sources" <<LIST
deb $mirror/debian $suite main
deb $mirror/debian $suite-updates main
deb $mirror/debian-security $suite-security main
LIST

# The initramfs contains only drivers for devices that can hold the root file system; udev loads those for present devices.
# LZ4, because it decompresses fast.
mkdir "$files/initramfs"
printf 'MODULES=list\nCOMPRESS=lz4\nFSTYPE=ext4\n' >"$files/initramfs/rudder"
cat >"$files/hook" <<'HOOK'
#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules ext4 crc32c_intel crc32c_generic sd_mod virtio_pci virtio_mmio virtio_blk virtio_scsi ahci ata_piix ata_generic \
    sym53c8xx mptspi megaraid_sas vmw_pvscsi nvme usb-storage uas xhci-pci ehci-pci uhci-hcd ohci-pci
HOOK
chmod 755 "$files/hook"

mmdebstrap --mode=root --variant=minbase --include="$packages" "${excludes[@]}" \
    --dpkgopt=force-unsafe-io --aptopt='Acquire::Retries "3"' \
    --setup-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
    --setup-hook="cp '$files/initramfs/rudder' \"\$1/etc/initramfs-tools/conf.d/rudder\"" \
    --setup-hook="mkdir -p \"\$1/etc/initramfs-tools/hooks\"; cp '$files/hook' \"\$1/etc/initramfs-tools/hooks/rudder\"" \
    "$suite" "$root" "$files/sources"

write() { # write PATH: writes standard input to this file of the guest.
    mkdir -p "$(dirname "$root$1")"
    cat >"$root$1"
}

rm -f "$root/etc/dpkg/dpkg.cfg.d/"*unsafe* "$root/etc/hostname" "$root/etc/ssh/ssh_host_"* "$root/etc/resolv.conf"
sed -i '/force-unsafe-io/d' "$root"/etc/dpkg/dpkg.cfg.d/* 2>/dev/null || true
echo localhost >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' | write /etc/hosts
ln -s ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"
rm -f "$root"/etc/apt/sources.list.d/*
cp "$files/sources" "$root/etc/apt/sources.list"
printf 'LANG=C.UTF-8\n' | write /etc/default/locale

# Mitigations are off: without hardware acceleration, separate page tables for kernel and user space make QEMU flush its TLB
# at every system call, and test guests need no isolation between users.
kernel_line="root=UUID=$uuid ro console=tty0 console=ttyS0,115200 loglevel=4 systemd.show_status=true random.trust_cpu=on no_timer_check"
kernel_line="$kernel_line mitigations=off cryptomgr.notests fsck.mode=skip"
write /etc/fstab <<FSTAB
UUID=$uuid / ext4 defaults,errors=remount-ro 0 0
FSTAB
# No menu. The kernel is loaded through the links that Debian's kernel packages maintain, so upgrades need no change here.
write /boot/grub/grub.cfg <<CFG
set timeout=0
insmod part_gpt
insmod ext2
search --no-floppy --fs-uuid --set=root $uuid
linux /vmlinuz $kernel_line
initrd /initrd.img
boot
CFG
write /etc/default/grub <<CFG
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX="${kernel_line#*ro }"
GRUB_TERMINAL="console serial"
CFG
mkdir -p "$root/boot/efi"

# cloud-init uses only the NoCloud seed and does not probe for clouds. Only an Ed25519 host key is generated, because
# generating an RSA key takes seconds without hardware acceleration.
write /etc/cloud/cloud.cfg.d/90_rudder.cfg <<CFG
datasource_list: [NoCloud, None]
ssh_genkeytypes: [ed25519]
apt: {preserve_sources_list: true}
system_info:
  network:
    renderers: [networkd]
    activators: [networkd]
CFG
# For NICs that the seed does not configure, and for all NICs once there is no seed (in a template or a clone).
write /etc/systemd/network/99-any.network <<CFG
[Match]
Type=ether

[Link]
RequiredForOnline=no

[Network]
DHCP=yes
CFG
write /etc/systemd/system/systemd-networkd-wait-online.service.d/any.conf <<CFG
[Service]
ExecStart=
ExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=30
CFG
write /etc/modules-load.d/pvpanic.conf <<CFG
pvpanic-mmio
pvpanic-pci
CFG
# Drivers for devices that QEMU always has but no test uses, and optimised ciphers that are slow without hardware acceleration.
printf 'blacklist %s\n' pcspkr i2c_piix4 i2c_i801 psmouse serio_raw joydev iTCO_wdt lpc_ich aesni_intel ghash_clmulni_intel \
    crct10dif_pclmul crc32_pclmul sha512_ssse3 sha256_ssse3 sha1_ssse3 parport_pc ppdev bochs | write /etc/modprobe.d/rudder.conf
echo 'policy: enabled' | write /etc/cloud/ds-identify.cfg
write /etc/ssh/sshd_config.d/10-rudder.conf <<CFG
UseDNS no
CFG

unit() { chroot "$root" systemctl --quiet "$@"; }
unit enable systemd-networkd.service systemd-resolved.service ssh.service
unit mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    systemd-pstore.service apt-daily.service apt-daily-upgrade.service systemd-tmpfiles-clean.timer
unit disable systemd-timesyncd.service

chroot "$root" dpkg-query -W >"$work/packages"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old "$root"/var/log/*.log \
    "$root"/var/log/apt "$root"/usr/share/man "$root"/tmp/* "$root"/boot/System.map-*
mkdir -p "$root/var/log/apt"

make_disk "$root" "$root" 2048 "$uuid" ""
publish_disk
