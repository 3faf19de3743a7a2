{{- define "tokenpool.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- /* At most 50 characters: KubeRay adds to the names of clusters and groups. */ -}}
{{- define "tokenpool.fullname" -}}
{{- $name := include "tokenpool.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* All pods of the release, whatever they run. */ -}}
{{- define "tokenpool.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tokenpool.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* The pods that answer HTTP. */ -}}
{{- define "tokenpool.serverLabels" -}}
{{ include "tokenpool.selectorLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "tokenpool.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "tokenpool.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "tokenpool.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tokenpool.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "tokenpool.image" -}}
{{- .Values.image.repository }}:{{ default (printf "%s-%s" .Chart.AppVersion .Values.device) .Values.image.tag -}}
{{- end -}}

{{- /* Bytes of a pool file's size, as decimal digits: 24GiB, 1.5 TB, 1073741824. */ -}}
{{- define "tokenpool.bytes" -}}
{{- if kindIs "string" . -}}
{{- $scales := dict "" 1.0 "b" 1.0 "kb" 1000.0 "mb" 1000000.0 "gb" 1000000000.0 "tb" 1000000000000.0 "ki" 1024.0 "mi" 1048576.0 "gi" 1073741824.0 "ti" 1099511627776.0 -}}
{{- $number := regexFind "^[0-9.]+" (trim .) -}}
{{- $unit := trimPrefix $number (trim .) | trim | lower -}}
{{- if hasSuffix "ib" $unit -}}{{- $unit = trimSuffix "b" $unit -}}{{- end -}}
{{- if not (and $number (hasKey $scales $unit)) -}}
{{- fail (printf "%q is no size: write such as 24GiB; the pod's memory is derived from it, so `auto` is not there" .) -}}
{{- end -}}
{{- mulf (float64 $number) (get $scales $unit) | ceil | int64 -}}
{{- else -}}
{{- int64 . -}}
{{- end -}}
{{- end -}}

{{- /* Whole seconds, rounded up, of a pool file's time: 60, 90s, 1.5m, 400ms. */ -}}
{{- define "tokenpool.seconds" -}}
{{- if kindIs "string" . -}}
{{- $scales := dict "" 1.0 "s" 1.0 "us" 0.000001 "ms" 0.001 "m" 60.0 "h" 3600.0 -}}
{{- $number := regexFind "^[0-9.]+" (trim .) -}}
{{- $unit := trimPrefix $number (trim .) | trim | lower -}}
{{- if not (and $number (hasKey $scales $unit)) -}}
{{- fail (printf "%q is no time: write such as 60s" .) -}}
{{- end -}}
{{- mulf (float64 $number) (get $scales $unit) | ceil | int64 -}}
{{- else -}}
{{- ceil . | int64 -}}
{{- end -}}
{{- end -}}

{{- /* Fails where the port would be open to the world and no key be asked for. */ -}}
{{- define "tokenpool.checkOpen" -}}
{{- $asksKeys := not (empty .Values.keys.api) -}}
{{- range .Values.pool.tenants -}}
{{- if ne .name "default" -}}{{- $asksKeys = true -}}{{- end -}}
{{- end -}}
{{- if not (or $asksKeys .Values.keys.allowOpen) -}}
{{- range $value, $opens := dict "ingress.enabled" .Values.ingress.enabled "httpRoute.enabled" .Values.httpRoute.enabled "service.type" (ne .Values.service.type "ClusterIP") -}}
{{- if $opens -}}
{{- fail (printf "%s would let everybody use the models without a key: set keys.api or pool.tenants, or keys.allowOpen=true" $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tokenpool.graceSeconds" -}}
{{- $drain := include "tokenpool.seconds" (default "60s" .Values.pool.shutdown_timeout) | int64 -}}
{{- add $drain .Values.drain.delaySeconds .Values.drain.extraSeconds -}}
{{- end -}}

{{- /* Bytes for the processes and the models' apps, without budgets. */ -}}
{{- define "tokenpool.processBytes" -}}
{{- $base := include "tokenpool.bytes" .Values.memory.base | int64 -}}
{{- $each := include "tokenpool.bytes" .Values.memory.perModel | int64 -}}
{{- add $base (mul $each (max (len .Values.pool.models) .Values.memory.models)) -}}
{{- end -}}

{{- /* Bytes for the frontends, where there are several. */ -}}
{{- define "tokenpool.frontendBytes" -}}
{{- $count := default 1 .Values.pool.frontends | int64 -}}
{{- ternary (mul $count (include "tokenpool.bytes" .Values.memory.perFrontend | int64)) 0 (gt $count 1) -}}
{{- end -}}

{{- /* Memory of a pod with an engine host: processes, 1 GiB of /dev/shm, and the budgets with headroom. */ -}}
{{- define "tokenpool.hostMemory" -}}
{{- if .Values.memory.override -}}
{{- .Values.memory.override -}}
{{- else -}}
{{- $budget := include "tokenpool.bytes" .Values.pool.host_memory | int64 -}}
{{- if eq .Values.device "cpu" -}}
{{- $budget = add $budget (include "tokenpool.bytes" .Values.pool.device_memory | int64) -}}
{{- end -}}
{{- $processes := include "tokenpool.processBytes" . | int64 -}}
{{- if ne .Values.mode "raycluster" -}}
{{- $processes = add $processes (include "tokenpool.frontendBytes" . | int64) -}}
{{- end -}}
{{- $bytes := addf (mulf $budget .Values.memory.headroom) $processes 1073741824.0 -}}
{{- divf $bytes 1048576.0 | ceil | int64 }}Mi
{{- end -}}
{{- end -}}

{{- define "tokenpool.frontendMemory" -}}
{{- $bytes := add (include "tokenpool.processBytes" . | int64) (include "tokenpool.frontendBytes" . | int64) -}}
{{- $derived := printf "%dMi" (div $bytes 1048576) -}}
{{- default $derived .Values.ray.frontend.memory -}}
{{- end -}}

{{- define "tokenpool.shm" -}}
{{- if .Values.memory.shm -}}
{{- .Values.memory.shm -}}
{{- else if eq .Values.mode "raycluster" -}}
{{- $budget := include "tokenpool.bytes" .Values.pool.host_memory | int64 -}}
{{- add 1024 (divf $budget 1048576.0 | ceil | int64) }}Mi
{{- else -}}
1Gi
{{- end -}}
{{- end -}}

{{- /* The pool file. Keys come from the environment, so that the ConfigMap holds no secret. */ -}}
{{- define "tokenpool.poolFile" -}}
{{- $pool := deepCopy .Values.pool -}}
{{- $_ := set $pool "port" .Values.port -}}
{{- if .Values.inferencePool.enabled -}}
{{- $_ := set $pool "open_picker_metrics" true -}}
{{- end -}}
{{- range $setting, $refs := dict "api" .Values.keys.api "view" .Values.keys.view "admin" .Values.keys.admin "metrics" .Values.keys.metrics -}}
{{- $names := list -}}
{{- range $i, $ref := $refs -}}
{{- $names = append $names (printf "${TOKENPOOL_%s_KEY_%d}" (upper $setting) $i) -}}
{{- end -}}
{{- if $names -}}
{{- $_ := set $pool (printf "%s_key" $setting) $names -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.mode "raycluster" -}}
{{- $derived := dict "hosts" (include "tokenpool.numHosts" . | int64) "num_cpus_per_host" .Values.cpu.request -}}
{{- $_ := set $pool "cluster" (merge (default dict $pool.cluster) $derived) -}}
{{- end -}}
{{- toYaml $pool -}}
{{- end -}}

{{- /* Arguments: root context, and a model's name or "" for all of them. A name of a model may have signs that one of an object may not. */ -}}
{{- define "tokenpool.inferencePoolName" -}}
{{- $full := include "tokenpool.fullname" (index . 0) -}}
{{- with index . 1 -}}
{{- $plain := regexReplaceAll "[^a-z0-9]+" (lower .) "-" | trunc 40 | trimAll "-" -}}
{{- printf "%s-%s-%s" $full $plain (sha256sum . | trunc 6) -}}
{{- else -}}
{{- $full -}}
{{- end -}}
{{- end -}}

{{- define "tokenpool.priorityClass" -}}
{{- if .Values.priorityClass.create -}}
{{- /* It belongs to no namespace. */ -}}
{{- printf "%s-%s" (include "tokenpool.fullname" .) .Release.Namespace -}}
{{- else -}}
{{- .Values.priorityClassName -}}
{{- end -}}
{{- end -}}

{{- /* Takes the value `autoscaling`. A pod that goes drains its requests, and one that comes loads its models. */ -}}
{{- define "tokenpool.scalingBehavior" -}}
scaleUp:
  policies:
    - {type: Pods, value: {{ .upPods }}, periodSeconds: {{ .upSeconds }}}
scaleDown:
  stabilizationWindowSeconds: {{ .downSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: {{ .downSeconds }}}
{{- end -}}
