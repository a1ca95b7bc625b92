# ssh -J, one and two jumps deep, -W, -R of any port, and agent forwarding.
. "$CLIENTS/lib.sh"
ssh=(ssh -F "$SSH_CONFIG")
equal 'one jump' "$("${ssh[@]}" -J bastion inside 'echo $((6 * 7))')" 42
equal 'two jumps' "$("${ssh[@]}" -J bastion,inside further 'echo $((6 * 7))')" 42
equal 'status through a jump' "$(status "${ssh[@]}" -J bastion inside exit 9)" 9
random 8000000 >data
"${ssh[@]}" -J bastion inside cat <data >copy
cmp data copy
equal -W "$( (sleep 1) | "${ssh[@]}" -W "127.0.0.1:$PORT" bastion | head -c 8)" SSH-2.0-

eval "$(ssh-agent -s)" >/dev/null
children+=("$SSH_AGENT_PID")
ssh-add -q "$KEY"
# Three at once, as IDEs use an agent.
pids=()
for i in 1 2 3; do
	"${ssh[@]}" -A bastion 'ssh-add -l' >"agent.$i" &
	pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
for i in 1 2 3; do grep -q ED25519 "agent.$i"; done

"${ssh[@]}" -o LogLevel=INFO -N -R 0:127.0.0.1:"$PORT" bastion 2>forward & children+=($!)
eventually grep -q 'Allocated port' forward
greets 127.0.0.1 "$(sed -n 's/Allocated port \([0-9]*\) .*/\1/p' forward)"
