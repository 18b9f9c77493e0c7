#!/bin/sh
# The virtual machine's first process, in the initramfs: the host's files, read-only, with a layer in memory above them.
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
$busybox mount -t devtmpfs dev /dev
while read -r module; do $busybox insmod "$module" || echo "insmod $module failed"; done </modules/order
$busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose host /host &&
    $busybox mount -t tmpfs -o size=60% room /room &&
    $busybox mkdir /room/upper /room/work &&
    $busybox mount -t overlay -o lowerdir=/host,upperdir=/room/upper,workdir=/room/work overlay /new ||
    echo o >/proc/sysrq-trigger
read -r script </script
for directory in proc sys dev; do $busybox mount --move /$directory /new/$directory; done
exec $busybox switch_root /new /bin/sh "$script"
