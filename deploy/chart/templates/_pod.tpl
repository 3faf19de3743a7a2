{{- /* Parts that the pods of all modes share. Each takes the root context, `server` a dict. */ -}}

{{- /* In the root context `group` may be one of ray.hosts.groups. */ -}}
{{- define "tokenpool.podSpec" -}}
{{- $group := default dict .group -}}
serviceAccountName: {{ include "tokenpool.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "tokenpool.graceSeconds" . }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.userId }}
  runAsGroup: {{ .Values.userId }}
  fsGroup: {{ .Values.userId }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with include "tokenpool.priorityClass" . }}
priorityClassName: {{ . }}
{{- end }}
{{- with merge (dict) (default dict $group.nodeSelector) .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat (default list .Values.tolerations) (default list $group.tolerations) }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: pool
    configMap:
      name: {{ include "tokenpool.fullname" . }}
  - name: tmp
    emptyDir:
      sizeLimit: 2Gi
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ include "tokenpool.shm" . }}
  - name: cache
    {{- if .Values.cacheVolume.claim }}
    persistentVolumeClaim:
      claimName: {{ .Values.cacheVolume.claim }}
    {{- else }}
    emptyDir:
      sizeLimit: {{ .Values.cacheVolume.size }}
    {{- end }}
  {{- with .Values.modelVolume.claim }}
  - name: models
    persistentVolumeClaim:
      claimName: {{ . }}
      readOnly: true
  {{- end }}
{{- end -}}

{{- /* Arguments: root context, and the component whose pods are spread. */ -}}
{{- define "tokenpool.topologySpread" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- with $root.Values.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ .topologyKey }}
    maxSkew: {{ default 1 .maxSkew }}
    whenUnsatisfiable: {{ default "ScheduleAnyway" .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "tokenpool.selectorLabels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ $component }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "tokenpool.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "tokenpool.containerBase" -}}
image: {{ include "tokenpool.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {{- include "tokenpool.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: pool, mountPath: /etc/tokenpool, readOnly: true}
  - {name: tmp, mountPath: /tmp}
  - {name: shm, mountPath: /dev/shm}
  - {name: cache, mountPath: /cache}
  {{- if .Values.modelVolume.claim }}
  - {name: models, mountPath: {{ .Values.modelVolume.mountPath }}, readOnly: true}
  {{- end }}
env:
  # All that vLLM, Triton and the hub write, since the root filesystem is read-only. The folder of
  # PROMETHEUS_MULTIPROC_DIR and the sockets are made below TMPDIR by tokenpool itself.
  - {name: HOME, value: /cache/home}
  - {name: TMPDIR, value: /tmp}
  - {name: XDG_CACHE_HOME, value: /cache}
  - {name: XDG_CONFIG_HOME, value: /cache/config}
  - {name: HF_HOME, value: /cache/huggingface}
  - {name: VLLM_CACHE_ROOT, value: /cache/vllm}
  - {name: VLLM_CONFIG_ROOT, value: /cache/config/vllm}
  - {name: TRITON_CACHE_DIR, value: /cache/triton}
  - {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/inductor}
  - {name: VLLM_NO_USAGE_STATS, value: "1"}
  {{- if eq .Values.device "cpu" }}
  - {name: OMP_NUM_THREADS, value: {{ .Values.cpu.request | quote }}}
  - {name: VLLM_CPU_OMP_THREADS_BIND, value: nobind}
  {{- end }}
  {{- $given := dict }}
  {{- range .Values.env }}
  {{- $_ := set $given .name true }}
  - {name: {{ .name }}, value: {{ .value | quote }}}
  {{- end }}
  {{- if not (hasKey $given "VLLM_MEDIA_URL_ALLOW_REDIRECTS") }}
  - {name: VLLM_MEDIA_URL_ALLOW_REDIRECTS, value: "0"}
  {{- end }}
{{- end -}}

{{- /* The keys, and all else from Secrets: for the container that answers HTTP. */ -}}
{{- define "tokenpool.serverEnv" -}}
{{- range $setting, $refs := dict "API" .Values.keys.api "VIEW" .Values.keys.view "ADMIN" .Values.keys.admin "METRICS" .Values.keys.metrics }}
{{- range $i, $ref := $refs }}
- name: TOKENPOOL_{{ $setting }}_KEY_{{ $i }}
  valueFrom: {secretKeyRef: {name: {{ $ref.secret }}, key: {{ $ref.key }}}}
{{- end }}
{{- end }}
{{- range .Values.secretEnv }}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .key }}}}
{{- end }}
{{- end -}}

{{- /* What an engine host in a pod of its own needs from Secrets, to download models: the code of models runs there. */ -}}
{{- define "tokenpool.hostEnv" -}}
{{- range .Values.secretEnv }}
{{- if eq .name "HF_TOKEN" }}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Port and probes of a container that answers HTTP, and the delay before its SIGTERM. */ -}}
{{- define "tokenpool.http" -}}
ports:
  - {name: http, containerPort: {{ .Values.port }}}
startupProbe:
  httpGet: {path: {{ ternary "/ready?all=1" "/live" .Values.probes.untilLoaded | quote }}, port: http}
  {{- toYaml .Values.probes.startup | nindent 2 }}
  timeoutSeconds: 5
readinessProbe:
  httpGet: {path: /ready, port: http}
  {{- toYaml .Values.probes.readiness | nindent 2 }}
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /live, port: http}
  {{- toYaml .Values.probes.liveness | nindent 2 }}
  timeoutSeconds: 5
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ .Values.drain.delaySeconds | quote }}]
{{- end -}}

{{- define "tokenpool.hostResources" -}}
requests:
  cpu: {{ .Values.cpu.request | quote }}
  memory: {{ include "tokenpool.hostMemory" . }}
limits:
  {{- with .Values.cpu.limit }}
  cpu: {{ . | quote }}
  {{- end }}
  memory: {{ include "tokenpool.hostMemory" . }}
  {{- if eq .Values.device "cuda" }}
  {{ .Values.gpu.resource }}: {{ .Values.gpu.count }}
  {{- end }}
{{- end -}}

{{- /* Argument: list of the root context and the component. */ -}}
{{- define "tokenpool.rayPodMetadata" -}}
{{- $root := index . 0 -}}
labels:
  {{- include "tokenpool.selectorLabels" $root | nindent 2 }}
  app.kubernetes.io/component: {{ index . 1 }}
  {{- with $root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $root.Values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "tokenpool.rayContainerBase" -}}
{{ include "tokenpool.containerBase" . }}
  {{- if eq .Values.ray.auth "disabled" }}
  - {name: RAY_AUTH_MODE, value: disabled}
  {{- end }}
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  # While the head pod is away, requests go on for so long; by default Ray ends its processes after a minute.
  - {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: "3600"}
{{- end -}}
