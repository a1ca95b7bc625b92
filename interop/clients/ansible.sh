# Ansible with pipelining and a shared connection.
. "$CLIENTS/lib.sh"
cat >ansible.cfg <<EOF
[defaults]
inventory = $PWD/hosts
retry_files_enabled = no
local_tmp = $PWD/local
remote_tmp = $PWD/remote
interpreter_python = /usr/bin/python3
[ssh_connection]
pipelining = True
ssh_args = -F $SSH_CONFIG -o ControlMaster=auto -o ControlPersist=5s
control_path_dir = $PWD/cp
EOF
echo bastion >hosts
random 100000 >data
cat >play.yml <<EOF
- hosts: all
  gather_facts: yes
  tasks:
    - ping:
    - copy: {src: $PWD/data, dest: $PWD/copy, mode: "0600"}
    - shell: echo {{ item }} >>$PWD/loop; cat
      args: {stdin: "from stdin {{ item }}"}
      loop: [1, 2, 3, 4, 5]
      register: said
    - assert: {that: "said.results | map(attribute='stdout') | list == ['from stdin 1', 'from stdin 2', 'from stdin 3', 'from stdin 4', 'from stdin 5']"}
    - shell: exit 3
      register: bad
      failed_when: bad.rc != 3
EOF
export ANSIBLE_CONFIG=$PWD/ansible.cfg
ansible-playbook play.yml >log 2>&1 || { cat log >&2; exit 1; }
cmp data copy
equal loop "$(tr '\n' ' ' <loop)" '1 2 3 4 5 '
