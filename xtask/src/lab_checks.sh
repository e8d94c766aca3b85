# What is looked at between the three machines, on the server's console: sourced by its script, once for each kind of tunnel.
# The server and `one` share a segment, `two` is on another one, and the server is the router between them: packets between
# pods of the first two go through the nodes themselves, and those of `two` through the tunnel.

failed=0
passed() { echo "passed, up $(cut -d. -f1 /proc/uptime) s: $1"; }
missed() { echo "NOT PASSED: $1"; failed=1; }
# Tries a command until it succeeds, for as long as a slow machine may need.
try() {
  what=$1; shift
  for _ in $(seq 20); do
    if "$@"; then passed "$what"; return 0; fi
    sleep 2
  done
  missed "$what"
}
# Fails when a command succeeds.
never() { if "${@:2}"; then missed "$1"; else passed "$1"; fi; }
on_any() { if [ "$1" = server ]; then bash -c "$2"; else on "$1" "$2"; fi; }
# Everywhere: a host's own way to Services is another one than its pods'.
everywhere() { for machine in server one two; do try "$1, from $machine" on_any $machine "$2"; done; }
page() { [ "$(kubectl exec "$1" -- /bin/fetch "$2" 10 2>/dev/null)" = "$3" ]; }
url() { case "$1" in *:*) echo "[$1]:$2/hostname" ;; *) echo "$1:$2/hostname" ;; esac; }
get() { kubectl get $1 -o "jsonpath={$2}"; }
curls() { echo "curl -sSg -m 10 http://$(url "$1" "$2") | grep -q '^$3'"; }

pods_reach_pods() {
  for to in server one two; do
    for ip in $(get "pod web-$to" '.status.podIPs[*].ip'); do
      for from in server one two; do
        try "web-$from to web-$to at $ip" page "web-$from" "$(url "$ip" 8080)" "web-$to"
      done
    done
  done
}

services_lead_everywhere() {
  for ip in $(get 'service first' '.spec.clusterIPs[*]'); do
    everywhere "cluster address $ip" "$(curls "$ip" 80 web-server)"
  done
  for ip in $1; do
    everywhere "node port of $ip" "$(curls "$ip" 30080 web-server)"
  done
  until [ -n "$(get 'service balanced' '.status.loadBalancer.ingress[*].ip')" ]; do sleep 1; done
  for ip in $(get 'service balanced' '.status.loadBalancer.ingress[*].ip'); do
    everywhere "balancer address $ip" "$(curls "$ip" 80 web-)"
  done
  for from in server one two; do
    try "web-$from to the Service's name" page "web-$from" first.default:80/hostname web-server
    try "web-$from to a headless Service's pod" page "web-$from" web-two.each.default:8080/hostname web-two
  done
}

# Packets of full size pass, and those that are one byte larger are known to be too large by the pod that sends them.
packets_of_full_size_pass() {
  pid=$(pgrep -o -f '^/bin/http 8080')
  mtu=$(nsenter --target "$pid" --net ip -o link show eth0 | grep -o 'mtu [0-9]*' | cut -d' ' -f2)
  [ "$mtu" = "$1" ] && passed "pods' largest packet is $mtu" || missed "pods' largest packet is $mtu, not $1"
  for to in one two; do
    for ip in $(get "pod web-$to" '.status.podIPs[*].ip'); do
      case "$ip" in *:*) headers=48 ;; *) headers=28 ;; esac
      full="nsenter --target $pid --net ping -q -c 2 -W 5 -M do -s"
      try "a packet of $mtu bytes to web-$to at $ip" bash -c "$full $((mtu - headers)) $ip >/dev/null"
      never "no packet of $((mtu + 1)) bytes to web-$to at $ip" bash -c "$full $((mtu - headers + 1)) $ip >/dev/null 2>&1"
    done
  done
}

policies_hold_between_machines() {
  ip=$(get 'pod web-two' '.status.podIP')
  kubectl apply -f /opt/policy.yaml
  refused() { ! page "$@"; }
  try "a policy shuts web-server out of web-two" refused web-server "$(url "$ip" 8080)" web-two
  try "and lets web-one in" page web-one "$(url "$ip" 8080)" web-two
  kubectl delete -f /opt/policy.yaml
  try "and is gone when it is deleted" page web-server "$(url "$ip" 8080)" web-two
}

a_link_is_cut_and_mended() {
  on one 'for link in /sys/class/net/en*; do ip link set "${link##*/}" down; done' || missed "the link of one can be cut"
  never "nobody reaches web-one while its machine's link is cut" page web-server "$(url "$(get 'pod web-one' '.status.podIP')" 8080)" web-one
  on one 'for link in /sys/class/net/en*; do ip link set "${link##*/}" up; done' || missed "the link of one can be mended"
  for ip in $(get 'pod web-one' '.status.podIPs[*].ip'); do
    for from in server two; do
      try "web-$from to web-one at $ip over the mended link" page "web-$from" "$(url "$ip" 8080)" web-one
    done
  done
  try "the node is Ready" kubectl wait --for=condition=Ready node/one --timeout=10s
}

an_agent_is_killed() {
  before=$(get 'pod web-one' '.status.containerStatuses[0].containerID')
  on one 'kill -9 $(pgrep -f "^/opt/oarlock/oarlock .*agent$")' || missed "the agent of one can be killed"
  try "exec works again" page web-one "$(url "$(get 'pod web-server' '.status.podIP')" 8080)" web-server
  [ "$(get 'pod web-one' '.status.containerStatuses[0].containerID')" = "$before" ] && passed "its pod ran on" || missed "its pod ran on"
}

# check TUNNEL MTU ADDRESSES
check() {
  echo "--- by $1"
  until [ "$(kubectl get nodes --no-headers 2>/dev/null | grep -cw Ready)" = 3 ]; do sleep 1; done
  kubectl get nodes -o wide
  kubectl apply -f /opt/pods.yaml
  kubectl wait --for=condition=Ready pod --all --timeout=300s || { missed "pods are Ready"; kubectl describe pods; }
  kubectl get pods -o wide
  ip=$(get 'pod web-two' '.status.podIP')
  case $1 in vxlan) device=oar-vxlan4 ;; *) device=oar-wg0 ;; esac
  way() { ip route get "$ip" | grep -q "dev $device"; }
  try "the way to web-two is by $device" way
  pods_reach_pods
  packets_of_full_size_pass "$2"
  services_lead_everywhere "$3"
  policies_hold_between_machines
  a_link_is_cut_and_mended
  an_agent_is_killed
  [ "$(kubectl get csr | grep -c 'kube-apiserver-client .*Approved,Issued')" -ge 2 ] && passed "proxies have certificates" || missed "proxies have certificates"
}
