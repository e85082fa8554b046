# A tiny guest: Debian's kernel, busybox, dropbear and sudo. It answers SSH within seconds without hardware acceleration,
# reads the part of a NoCloud seed that Rudder writes, has a persistent disk, and has no bash, no cloud-init and no systemd.
# Password logins are allowed, and there is one user with a fixed password for tests: tester, password tester.
# Sourced by make. Uses: early.sh

uuid=7c2b9a34-05d1-4b7e-8c1f-90ab3d6e4f21
all=$work/all # Debian's packages, unpacked but not configured
root=$work/root
early=$work/early # the initramfs

packages=linux-image-amd64,busybox-static,dropbear-bin,openssh-sftp-server,sudo,kmod,grub-pc-bin,grub-efi-amd64-signed,shim-signed
printf 'deb %s/debian %s main\ndeb %s/debian %s-updates main\ndeb %s/debian-security %s-security main\n' \
    "$mirror" "$suite" "$mirror" "$suite" "$mirror" "$suite" >"$work/sources"
mmdebstrap --mode=root --variant=extract --include="$packages" --aptopt='Acquire::Retries "3"' \
    --extract-hook="ls \"\$1/var/cache/apt/archives\" >'$work/packages'" "$suite" "$all" "$work/sources"
kernel=$(basename "$all"/lib/modules/*)

. "$here/early.sh"
copy() { copy_programs "$all" "$root" "$@"; }

# The same layout as Debian's: /bin, /sbin, /lib and /lib64 are links into /usr.
mkdir -p "$root"/usr/bin "$root"/usr/sbin "$root"/usr/lib "$root"/usr/lib64
mkdir -p "$root"/dev "$root"/proc "$root"/sys "$root"/run "$root"/root "$root"/home "$root"/tmp "$root"/boot \
    "$root"/var/log "$root"/var/tmp "$root"/mnt "$root"/srv "$root"/opt "$root"/etc/dropbear "$root"/etc/sudoers.d "$root"/etc/acpi
for dir in bin sbin lib lib64; do ln -s usr/$dir "$root/$dir"; done
ln -s /run "$root/var/run"
ln -s /run/modules "$root/lib/modules"
chmod 1777 "$root/tmp" "$root/var/tmp"
chmod 700 "$root/root"

cp "$all/bin/busybox" "$root/bin/busybox"
for applet in $(chroot "$all" /bin/busybox --list); do
    case $applet in
        busybox | poweroff | reboot | halt) ;;
        *) ln -s busybox "$root/bin/$applet" ;;
    esac
done
for name in init modprobe; do ln -s ../bin/busybox "$root/sbin/$name"; done
for dir in /lib /usr/lib; do rm -rf "${all:?}$dir/x86_64-linux-gnu/glibc-hwcaps"; done
copy /usr/sbin/dropbear /usr/bin/dropbearkey /usr/lib/openssh/sftp-server /usr/bin/sudo /usr/libexec/sudo/sudoers.so \
    /lib/x86_64-linux-gnu/libnss_files.so.2
copy /usr/libexec/sudo/libsudo_util.so.0
chmod 4755 "$root/usr/bin/sudo"
ln -s openssh/sftp-server "$root/usr/lib/sftp-server"
# PAM is needed only by sudo.
copy /lib/x86_64-linux-gnu/security/pam_permit.so
mkdir -p "$root/etc/pam.d"
printf 'auth sufficient pam_permit.so\naccount sufficient pam_permit.so\nsession optional pam_permit.so\n' >"$root/etc/pam.d/sudo"

printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\ntester:x:1000:1000:tester:/home/tester:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\ntty:x:5:\nsudo:x:27:tester\nnogroup:x:65534:\ntester:x:1000:\n' >"$root/etc/group"
printf 'root:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\ntester:%s:19000:0:99999:7:::\n' \
    "$(chroot "$all" /bin/busybox mkpasswd -m sha256 -S rudder tester)" >"$root/etc/shadow"
chmod 640 "$root/etc/shadow"
mkdir -p "$root/home/tester"
chown 1000:1000 "$root/home/tester"
printf 'Defaults secure_path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"\nroot ALL=(ALL:ALL) NOPASSWD: ALL\n%%sudo ALL=(ALL:ALL) NOPASSWD: ALL\n' >"$root/etc/sudoers"
chmod 440 "$root/etc/sudoers"
echo 'passwd: files
group: files
shadow: files
hosts: files dns' >"$root/etc/nsswitch.conf"
echo tiny >"$root/etc/hostname"
printf '127.0.0.1 localhost tiny\n::1 localhost\n' >"$root/etc/hosts"
printf '/bin/sh\n' >"$root/etc/shells"
printf 'ID=tiny\nNAME="Rudder tiny guest"\nVERSION_ID=1\n' >"$root/etc/os-release"
printf '/dev/root / ext4 defaults 0 0\n' >"$root/etc/fstab"
printf 'export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n' >"$root/etc/profile"
printf '::sysinit:/etc/start\nttyS0::respawn:/bin/getty -L 115200 ttyS0 vt100\ntty1::respawn:/bin/getty 38400 tty1\n::ctrlaltdel:/sbin/reboot\n' >"$root/etc/inittab"
install -m 755 "$here/tiny/start" "$here/tiny/seed" "$here/tiny/udhcpc" "$root/etc/"
for name in poweroff halt reboot shutdown; do install -m 755 "$here/tiny/halt" "$root/sbin/$name"; done
mkdir -p "$root/etc/acpi/PWRF"
printf '#!/bin/sh\nexec /sbin/poweroff\n' >"$root/etc/acpi/PWRF/00000080"
chmod 755 "$root/etc/acpi/PWRF/00000080"

# The initramfs contains the drivers for all hardware that a manifest can request, and loads those for the devices it finds.
early_programs "$all" "$early" sh grep mount modprobe cat sort xargs findfs sleep poweroff cp echo switch_root
mkdir "$early/root"
sed "s/@UUID@/$uuid/" "$here/tiny/init" >"$early/init"
chmod 755 "$early/init"
wanted="ext4 crc32c_generic crc32c_intel vfat isofs nls_cp437 nls_ascii nls_iso8859-1 nls_utf8
    virtio_pci virtio_blk virtio_scsi virtio_net virtio_rng virtio_balloon sd_mod sr_mod ahci ata_piix ata_generic sym53c8xx
    usb-storage uas xhci-pci ehci-pci uhci-hcd ohci-pci floppy
    e1000 e1000e 8139cp 8139too pcnet32 ne2k-pci af_packet button evdev pvpanic-mmio pvpanic-pci i6300esb"
# shellcheck disable=SC2086
early_modules "$all" "$early" "$kernel" $wanted
pack_early "$early" "$root/boot/initrd"
cp "$all/boot/vmlinuz-$kernel" "$root/boot/vmlinuz"

line="console=tty0 console=ttyS0,115200 loglevel=4 random.trust_cpu=on no_timer_check usb-storage.delay_use=0 nomodeset mitigations=off nokaslr cryptomgr.notests audit=0"
mkdir -p "$root/boot/grub"
printf 'set timeout=0\nlinux /boot/vmlinuz %s\ninitrd /boot/initrd\nboot\n' "$line" >"$root/boot/grub/grub.cfg"
make_disk "$root" "$all" 256 "$uuid" "linux (\$root)/boot/vmlinuz $line
initrd (\$root)/boot/initrd
boot"
publish_disk
