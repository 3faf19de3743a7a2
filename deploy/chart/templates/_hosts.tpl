{{- /* The worker groups with engine hosts of mode raycluster. Each takes the root context. */ -}}

{{- /* `{min: N, max: M}` of pool.cluster.hosts as JSON; {} where there is always the same number. */ -}}
{{- define "tokenpool.hostRange" -}}
{{- $hosts := get (default dict .Values.pool.cluster) "hosts" -}}
{{- ternary $hosts dict (kindIs "map" $hosts) | toJson -}}
{{- end -}}

{{- /* How many hosts there are, where that is always the same number. */ -}}
{{- define "tokenpool.numHosts" -}}
{{- $hosts := get (default dict .Values.pool.cluster) "hosts" -}}
{{- $count := 0 -}}
{{- if .Values.ray.hosts.groups -}}
{{- range .Values.ray.hosts.groups -}}{{- $count = add $count (default 0 .replicas) -}}{{- end -}}
{{- else if .Values.ray.hosts.replicas -}}
{{- $count = .Values.ray.hosts.replicas -}}
{{- else -}}
{{- $count = ternary $hosts 2 (has (kindOf $hosts) (list "int" "int64" "float64")) -}}
{{- end -}}
{{- $count | int64 -}}
{{- end -}}

{{- /* Worker groups as a JSON list: name, labels, nodeSelector, tolerations, min, max, and replicas where they are fixed. */ -}}
{{- define "tokenpool.hostGroups" -}}
{{- $range := include "tokenpool.hostRange" . | fromJson -}}
{{- $groups := list -}}
{{- if not .Values.ray.hosts.groups -}}
{{- $count := include "tokenpool.numHosts" . | int64 -}}
{{- $groups = ternary (list (dict "name" "hosts" "min" $range.min "max" $range.max)) (list (dict "name" "hosts" "replicas" $count "min" $count "max" $count)) (not (empty $range)) -}}
{{- end -}}
{{- range .Values.ray.hosts.groups -}}
{{- if $range -}}
{{- $groups = append $groups (merge (dict "min" 0 "max" (default $range.max .max)) .) -}}
{{- else -}}
{{- $groups = append $groups (merge (dict "min" .replicas "max" .replicas) .) -}}
{{- end -}}
{{- end -}}
{{- toJson $groups -}}
{{- end -}}

{{- /* Fails where values of hosts contradict each other. */ -}}
{{- define "tokenpool.checkHosts" -}}
{{- $cluster := default dict .Values.pool.cluster -}}
{{- $hosts := get $cluster "hosts" -}}
{{- $replicas := .Values.ray.hosts.replicas -}}
{{- $range := include "tokenpool.hostRange" . | fromJson -}}
{{- $written := printf "{min: %v, max: %v}" $range.min $range.max -}}
{{- if and $replicas .Values.ray.hosts.groups -}}
{{- fail "ray.hosts.replicas is not there with ray.hosts.groups: each group has its own" -}}
{{- end -}}
{{- if hasKey $cluster "num_cpus_per_host" -}}
{{- if ne (float64 $cluster.num_cpus_per_host) (float64 .Values.cpu.request) -}}
{{- fail (printf "pool.cluster.num_cpus_per_host is %v, cpu.request is %v: a pod has one host, leave the first one out" $cluster.num_cpus_per_host .Values.cpu.request) -}}
{{- end -}}
{{- end -}}
{{- $names := list "frontend" -}}
{{- $room := 0 -}}
{{- range .Values.ray.hosts.groups -}}
{{- if has .name $names -}}
{{- fail (printf "ray.hosts.groups: %q is the name of another group" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- if and $range .replicas -}}
{{- fail (printf "ray.hosts.groups: %s has replicas, but pool.cluster.hosts is %s: give it a max" .name $written) -}}
{{- else if and (not $range) .max -}}
{{- fail (printf "ray.hosts.groups: %s has a max, which needs pool.cluster.hosts as {min: N, max: M}: give it replicas" .name) -}}
{{- else if not (or $range .replicas) -}}
{{- fail (printf "ray.hosts.groups: %s needs replicas, or pool.cluster.hosts as {min: N, max: M}" .name) -}}
{{- end -}}
{{- $room = add $room (default (default 0 $range.max) .max) -}}
{{- end -}}
{{- if $range -}}
{{- if gt (int64 $range.min) (int64 $range.max) -}}
{{- fail (printf "pool.cluster.hosts is %s: min is more than max" $written) -}}
{{- end -}}
{{- if $replicas -}}
{{- fail (printf "ray.hosts.replicas is %v, but pool.cluster.hosts is %s: leave the first one empty" $replicas $written) -}}
{{- end -}}
{{- if and .Values.ray.hosts.groups (lt $room (int64 $range.max)) -}}
{{- fail (printf "ray.hosts.groups have %d pods at most, pool.cluster.hosts is %s: raise a group's max, or lower that" $room $written) -}}
{{- end -}}
{{- if not (or .Values.serviceAccount.create .Values.serviceAccount.name) -}}
{{- fail "pool.cluster.hosts as {min: N, max: M} gives the pods' service account rights on pods: set serviceAccount.create or serviceAccount.name, so that it is not the namespace's default" -}}
{{- end -}}
{{- with .Values.networkPolicy -}}
{{- if and .enabled .egress.restrict (not .egress.to) -}}
{{- fail "pool.cluster.hosts as {min: N, max: M} needs the Kubernetes API: name it in networkPolicy.egress.to" -}}
{{- end -}}
{{- end -}}
{{- include "tokenpool.checkModelHosts" . -}}
{{- else if and (has (kindOf $hosts) (list "int" "int64" "float64")) (ne (int64 $hosts) (include "tokenpool.numHosts" . | int64)) -}}
{{- fail (printf "pool.cluster.hosts is %v, but ray.hosts has %s pods: leave the first one out" $hosts (include "tokenpool.numHosts" .)) -}}
{{- end -}}
{{- end -}}

{{- /* Fails where a model wants pods with labels, as Ray's autoscaler is asked for, and no group has them. */ -}}
{{- define "tokenpool.checkModelHosts" -}}
{{- $groups := default (list (dict "labels" dict)) .Values.ray.hosts.groups -}}
{{- range $model := .Values.pool.models -}}
{{- $wanted := $model.hosts -}}
{{- if kindIs "string" $wanted -}}{{- $wanted = list $wanted -}}{{- end -}}
{{- $isThere := false -}}
{{- range $group := $groups -}}
{{- $labels := list -}}
{{- range $key, $value := $group.labels -}}{{- $labels = append $labels (printf "%s=%s" $key $value) -}}{{- end -}}
{{- $isWanted := true -}}
{{- $isOff := false -}}
{{- range $wanted -}}
{{- if hasPrefix "!" . -}}
{{- if has (trimPrefix "!" .) $labels -}}{{- $isOff = true -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- range $wanted -}}
{{- if not (hasPrefix "!" .) -}}{{- $isWanted = false -}}{{- end -}}
{{- end -}}
{{- range $wanted -}}
{{- if has . $labels -}}{{- $isWanted = true -}}{{- end -}}
{{- end -}}
{{- if and $isWanted (not $isOff) -}}{{- $isThere = true -}}{{- end -}}
{{- end -}}
{{- if not $isThere -}}
{{- fail (printf "pool.models: %s wants hosts %s, which no group of ray.hosts.groups has as labels" $model.name (join ", " $wanted)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
