# The virtual machine's first process in the host's file system. What it prints goes to the second serial line; a line
# that begins with byte 1 is for xtask (transcript.rs). The list of suites is below, added by xtask.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
stty -F /dev/ttyS1 raw -echo
exec </dev/null >/dev/ttyS1 2>&1

mount -t tmpfs run /run
mkdir -p /run/lock /run/netns /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts devpts /dev/pts
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tracefs tracefs /sys/kernel/tracing
# The kernel asks for its modules by name.
mkdir -p /lib/modules/"$(uname -r)"
mount --bind "$modules" /lib/modules/"$(uname -r)"
ln -s "$busybox" /run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe
ip link set lo up
hostname portcullis-kernel
ulimit -n 1048576

tell() { printf '\001%s\n' "$*"; }

suite() {
    number=$1 directory=$2
    shift 2
    tell "begin $number"
    cd "$directory" && CARGO_MANIFEST_DIR=$directory "$@"
    tell "end $number $?"
}

tell "kernel $(uname -r)"
suites
tell done
# Not before the line is written out.
stty -F /dev/ttyS1 raw
echo o >/proc/sysrq-trigger
while :; do sleep 1; done
