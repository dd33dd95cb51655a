#!/bin/bash
# sge-up.sh DIR QMASTER_PORT EXECD_PORT    starts a private Grid Engine (Debian's Son of Grid Engine 8.1.9) of this one
# host under DIR, as root, with nothing but a host group @allhosts: GridEngine in grid_engine_lab.py adds the queues.
# DIR/env.sh is what its commands need in their environment. Several can run at once: by its port each has additional
# groups of its own, by which Grid Engine kills, and numbers for its jobs.
set -eu
D=$1 H=$(hostname) L=/usr/lib/gridengine S=/usr/share/gridengine
# a root of its own: /var/lib/gridengine stays as it was installed
install -d -o sgeadmin -g sgeadmin "$D" "$D"/default{,/common} "$D"/spool{,/qmaster,/qmaster/job_scripts,/execd}
for name in bin lib utilbin util; do ln -s "/var/lib/gridengine/$name" "$D/$name"; done
C=$D/default/common
cat >"$C/bootstrap" <<END
admin_user              sgeadmin
default_domain          none
ignore_fqdn             true
spooling_method         classic
spooling_lib            libspoolc
spooling_params         $C;$D/spool/qmaster
binary_path             $D/bin
qmaster_spool_dir       $D/spool/qmaster
security_mode           none
listener_threads        2
worker_threads          2
scheduler_threads       1
jvm_threads             0
END
echo "$H" >"$C/act_qmaster"
# all names of 127.0.0.1 are this one host
names=$(awk -v h="$H" '$1 == "127.0.0.1" { for (i = 2; i <= NF; i++) if ($i != "localhost" && $i != h) print $i }' /etc/hosts)
echo "$H localhost" "${names//$'\n'/ }" >"$C/host_aliases"
echo "export SGE_ROOT=$D SGE_CELL=default SGE_ARCH=lx-amd64 SGE_QMASTER_PORT=$2 SGE_EXECD_PORT=$3" >"$D/env.sh"
# shellcheck source=/dev/null
. "$D/env.sh"
chown -R sgeadmin:sgeadmin "$D/default" "$D/spool"

sed -e "s|^execd_spool_dir .*|execd_spool_dir $D/spool/execd|" -e 's|^mailer .*|mailer /bin/true|' \
  -e 's|^load_report_time .*|load_report_time 00:00:02|' \
  -e "s|^gid_range .*|gid_range $((1000000 + $2 * 100))-$((1000099 + $2 * 100))|" \
  -e 's|flush_time=00:00:15|flush_time=00:00:01 accounting_flush_time=00:00:00|' $S/default-configuration >"$D/conf"
as_admin() { setpriv --reuid sgeadmin --regid sgeadmin --init-groups env LD_LIBRARY_PATH=$L "$@"; }
as_admin $L/spoolinit classic libspoolc "$C;$D/spool/qmaster" init
as_admin $L/spooldefaults.bin configuration "$D/conf"
as_admin $L/spooldefaults.bin complexes $S/util/resources/centry
as_admin $L/spooldefaults.bin usersets $S/util/resources/usersets
as_admin $L/spooldefaults.bin managers root sgeadmin
as_admin $L/spooldefaults.bin operators root sgeadmin

echo "$(($2 * 100))" >"$D/spool/qmaster/jobseqnum"
chown sgeadmin:sgeadmin "$D/spool/qmaster/jobseqnum"
$L/sge_qmaster
until $L/qconf -sh >/dev/null 2>&1; do sleep .1; done
$L/qconf -as "$H" >/dev/null 2>&1 || true
$L/sge_execd
until $L/qconf -sel 2>/dev/null | grep -q .; do sleep .1; done
$L/qconf -ssconf | sed -e 's/^schedule_interval .*/schedule_interval 0:0:1/' \
  -e 's/^flush_submit_sec .*/flush_submit_sec 1/' -e 's/^flush_finish_sec .*/flush_finish_sec 1/' >"$D/sconf"
$L/qconf -Msconf "$D/sconf" >/dev/null
printf 'group_name @allhosts\nhostlist %s\n' "$H" >"$D/hosts"
$L/qconf -Ahgrp "$D/hosts" >/dev/null
