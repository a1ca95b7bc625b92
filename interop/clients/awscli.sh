# AWS's own command line against the imitation of AWS that the launcher's tests use, to verify the imitation with independent
# code: aws lists and stops the bastion of a login, starts tasks, and creates security groups.
. "$CLIENTS/lib.sh"
aws() { /usr/bin/aws --output text --endpoint-url "$AWS_ENDPOINT_URL" "$@"; } # Debian's version ignores the variable
# refused CODE COMMAND ...: fails unless the call is rejected with CODE.
refused() {
	local code=$1
	shift
	! aws "$@" 2>refusal || { echo "not refused: aws $*" >&2; return 1; }
	grep -q "($code)" refusal || { cat refusal >&2; return 1; }
}
(cd "$CLIENTS/../.." && go build -o "$OLDPWD/awsfake" ./interop/awsfake)
mkdir tasks
background ./awsfake --agent "$BIN/bastion-agent" --dir tasks --state 300ms >environment
eventually grep -q '^# cluster' environment
. ./environment

equal account "$(aws sts get-caller-identity --query Account)" 123456789012
AWS_SECRET_ACCESS_KEY=wrong refused SignatureDoesNotMatch sts get-caller-identity
AWS_SECRET_ACCESS_KEY=wrong refused InvalidSignatureException ecs list-tasks --cluster sallyport

# A bastion of a gateway.
mkdir keys
cp "$KEY.pub" keys/alice
ssh-keygen -q -t ed25519 -N '' -f host_key
ssh-keygen -q -t ed25519 -N '' -f fleet_key
port=$(free_port)
cat >gateway.yaml <<-EOF
	listen: 127.0.0.1:$port
	host_keys: host_key
	fleet_key: fleet_key
	authorized_keys_dir: keys
	state_dir: state
	profiles:
	  default:
	    launcher: fargate
	    fargate:
	      cluster: sallyport
	      task_definition: sallyport-bastion:7
	      subnets: [subnet-0fa4e00a, subnet-0fa4e00b]
	      security_groups: [sg-0fa4e001]
	      account: $(id -un)
EOF
chmod 700 keys
"$BIN/gateway" check --aws --config gateway.yaml
background "$BIN/gateway" serve --config gateway.yaml 2>gateway.log
eventually grep -q '"listening"' gateway.log
ssh=(ssh -p "$port" -i "$KEY" -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=known_hosts alice@127.0.0.1)
equal 'a command' "$("${ssh[@]}" 'echo $((6 * 7))' 2>/dev/null)" 42
task=$(aws ecs list-tasks --cluster sallyport --started-by sallyport/default --query 'taskArns[]')
equal 'one task' "$(wc -w <<<"$task")" 1
equal 'its user' "$(aws ecs describe-tasks --cluster sallyport --tasks "$task" --include TAGS --query "tasks[0].tags[?key=='sallyport:user'].value")" alice
runs() { [ "$(aws ecs describe-tasks --cluster sallyport --tasks "$task" --query 'tasks[0].lastStatus')" = RUNNING ]; }
eventually runs
"${ssh[@]}" 'echo is there; sleep 1000' >ended 2>&1 &
eventually grep -q 'is there' ended
aws ecs stop-task --cluster sallyport --task "$task" --reason 'by hand' --query task.desiredStatus | grep -qx STOPPED
equal 'status of what it ended' "$(status wait $!)" 255
aws ecs wait tasks-stopped --cluster sallyport --tasks "$task"
equal reason "$(aws ecs describe-tasks --cluster sallyport --tasks "$task" --query 'tasks[0].stoppedReason')" 'by hand'

# Tasks without an owner. Debian's aws has no client tokens yet.
run=(ecs run-task --cluster sallyport --task-definition sallyport-bastion:7 --launch-type FARGATE --started-by me
	--network-configuration 'awsvpcConfiguration={subnets=[subnet-0fa4e00a],securityGroups=[sg-0fa4e001]}')
read -r first state <<<"$(aws "${run[@]}" --query 'tasks[0].[taskArn,desiredStatus]')"
equal 'its state' "$state" RUNNING
equal startedBy "$(aws ecs describe-tasks --cluster sallyport --tasks "$first" --query 'tasks[0].startedBy')" me # it may have ended by now, because it has no owner
equal 'not among the gateway'"'"'s' "$(aws ecs list-tasks --cluster sallyport --started-by sallyport/default --query 'taskArns[]')" ''
refused InvalidParameterException "${run[@]}" --count 11
refused ClusterNotFoundException ecs list-tasks --cluster other
refused ClientException ecs run-task --cluster sallyport --task-definition other:1 --launch-type FARGATE
equal 'unknown task' "$(aws ecs describe-tasks --cluster sallyport --tasks 0123456789abcdef0123456789abcdef --query 'failures[0].reason')" MISSING

# Security groups.
group=$(aws ec2 create-security-group --group-name test --description test --vpc-id "$(aws ec2 describe-subnets --subnet-ids subnet-0fa4e00a --query 'Subnets[0].VpcId')" --query GroupId)
refused InvalidGroup.Duplicate ec2 create-security-group --group-name test --description test --vpc-id "$(aws ec2 describe-security-groups --group-ids "$group" --query 'SecurityGroups[0].VpcId')"
aws ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 2022 --cidr 10.0.0.0/8 >/dev/null
refused InvalidPermission.Duplicate ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 2022 --cidr 10.0.0.0/8
equal rule "$(aws ec2 describe-security-groups --group-ids "$group" --query 'SecurityGroups[0].IpPermissions[0].[IpProtocol,FromPort,IpRanges[0].CidrIp]' | xargs)" 'tcp 2022 10.0.0.0/8'
aws ec2 delete-security-group --group-id "$group" >/dev/null
refused InvalidGroup.NotFound ec2 describe-security-groups --group-ids "$group"
