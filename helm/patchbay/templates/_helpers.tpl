{{/* Names. KubeRay allows a RayService 47 characters of a DNS label. */}}
{{- define "patchbay.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 47 | trimSuffix "-" -}}
{{- end -}}

{{- define "patchbay.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 47 | trimSuffix "-" -}}
{{- else if contains (include "patchbay.name" .) .Release.Name -}}
{{- .Release.Name | trunc 47 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "patchbay.name" .) | trunc 47 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "patchbay.selectorLabels" -}}
app.kubernetes.io/name: {{ include "patchbay.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "patchbay.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "patchbay.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "patchbay.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "patchbay.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "patchbay.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "patchbay.configPath" -}}/etc/patchbay/patchbay.yaml{{- end -}}
{{- define "patchbay.keysDir" -}}/etc/patchbay/keys{{- end -}}
{{- define "patchbay.configName" -}}{{ include "patchbay.fullname" . }}-config{{- end -}}
{{- define "patchbay.keysSecretName" -}}
{{- default (printf "%s-keys" (include "patchbay.fullname" .)) .Values.keys.existingSecret -}}
{{- end -}}
{{- define "patchbay.firstKeySecretName" -}}{{ include "patchbay.fullname" . }}-first-key{{- end -}}
{{- define "patchbay.cacheClaimName" -}}
{{- default (printf "%s-model-cache" (include "patchbay.fullname" .)) .Values.huggingFace.cache.existingClaim -}}
{{- end -}}
{{- define "patchbay.artifactsClaimName" -}}
{{- default (printf "%s-artifacts" (include "patchbay.fullname" .)) .Values.artifacts.existingClaim -}}
{{- end -}}
{{- define "patchbay.artifactsDir" -}}/var/lib/patchbay/artifacts{{- end -}}
{{- define "patchbay.insecure" -}}{{- if .Values.config.insecure -}}true{{- end -}}{{- end -}}

{{/* patchbay.yaml: the values' config block and nothing else. */}}
{{- define "patchbay.config" -}}
{{- toYaml .Values.config -}}
{{- end -}}

{{/*
What Ray Serve is told: the same applications, built by the same functions, that `patchbay serve --config` deploys; the
test feeds this to Ray's own schema and compares it with what the code says for the same file.
*/}}
{{- define "patchbay.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
grpc_options:
  port: {{ .Values.config.port | default 9000 | int }}
  grpc_servicer_functions:
    - patchbay_server.transport.registration.add_servicer_to_server
    - grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server
  enable_reflection: true
logging_config:
  log_level: {{ .Values.config.log_level | default "info" | upper }}
  enable_access_log: false
applications:
  - name: control
    route_prefix: /control
    import_path: patchbay_server.serving.control:build_app
    args:
      config: {{ include "patchbay.configPath" . }}
    # It reserves nothing here, so that it fits on the head, which has no CPUs to give to models.
    deployments:
      - name: control
        ray_actor_options: {num_cpus: 0}
  {{- range .Values.config.models }}
  - name: {{ .name | quote }}
    route_prefix: {{ printf "/%s" .name | quote }}
    import_path: patchbay_server.serving.ray:build_app
    args:
      config: {{ include "patchbay.configPath" $ }}
      model: {{ .name | quote }}
  {{- end }}
{{- end -}}

{{/* How many CPUs Ray counts in a pod with this limit: KubeRay rounds up. */}}
{{- define "patchbay.wholeCpus" -}}
{{- $cpu := toString . -}}
{{- if hasSuffix "m" $cpu -}}
{{- ceil (divf (trimSuffix "m" $cpu | float64) 1000.0) -}}
{{- else -}}
{{- ceil (float64 $cpu) -}}
{{- end -}}
{{- end -}}

{{/* Mistakes that the schema cannot see, said before anything is installed. */}}
{{- define "patchbay.validate" -}}
{{- if and (not .Values.config.insecure) (ne (dig "keys" "file" "" .Values.config) (printf "%s/keys.json" (include "patchbay.keysDir" .))) -}}
{{- fail (printf "config.keys.file must stay %s/keys.json, where the chart mounts the keys' Secret" (include "patchbay.keysDir" .)) -}}
{{- end -}}
{{- if dig "keys" "write_local" true .Values.config -}}
{{- fail "config.keys.write_local must stay false: pods have no local clients" -}}
{{- end -}}
{{- if ne (dig "artifacts" "path" "" .Values.config) (include "patchbay.artifactsDir" .) -}}
{{- fail (printf "config.artifacts.path must stay %s, where the chart mounts their volume" (include "patchbay.artifactsDir" .)) -}}
{{- end -}}
{{- if .Values.config.tls -}}
{{- fail "config.tls is for the plain server; on Kubernetes TLS ends at the gateway or the ingress" -}}
{{- end -}}
{{- if .Values.config.connections -}}
{{- fail "config.connections is for the plain server; on Kubernetes the ingress of Ray Serve holds the connections" -}}
{{- end -}}
{{- $cpus := 0.0 -}}
{{- $gpus := 0.0 -}}
{{- range .Values.config.models -}}
{{- $replicas := float64 (default 1 .replicas) -}}
{{- $cpus = addf $cpus (mulf $replicas (float64 (ternary .num_cpus 1 (hasKey . "num_cpus")))) -}}
{{- $gpus = addf $gpus (mulf $replicas (float64 (default 0 .num_gpus))) -}}
{{- end -}}
{{- $cpusOffered := 0.0 -}}
{{- $gpusOffered := 0.0 -}}
{{- range .Values.workers -}}
{{- $cpusOffered = addf $cpusOffered (mulf (float64 .replicas) (include "patchbay.wholeCpus" .resources.limits.cpu | float64)) -}}
{{- $gpusOffered = addf $gpusOffered (mulf (float64 .replicas) (float64 (dig "limits" "nvidia.com/gpu" 0 .resources))) -}}
{{- end -}}
{{- if gt $gpus $gpusOffered -}}
{{- fail (printf "config.models reserve %v GPUs in all, but the worker groups offer %v (replicas x resources.limits of nvidia.com/gpu): the models would wait for ever" $gpus $gpusOffered) -}}
{{- end -}}
{{- if gt $cpus $cpusOffered -}}
{{- fail (printf "config.models reserve %v CPUs in all, but the worker groups offer %v (replicas x resources.limits.cpu): the models would wait for ever" $cpus $cpusOffered) -}}
{{- end -}}
{{- range $model := .Values.config.models -}}
{{- $cpus := float64 (ternary $model.num_cpus 1 (hasKey $model "num_cpus")) -}}
{{- $gpus := float64 (default 0 $model.num_gpus) -}}
{{- $fits := false -}}
{{- range $.Values.workers -}}
{{- $offered := include "patchbay.wholeCpus" .resources.limits.cpu | float64 -}}
{{- if and (ge $offered $cpus) (ge (float64 (dig "limits" "nvidia.com/gpu" 0 .resources)) $gpus) -}}
{{- $fits = true -}}
{{- end -}}
{{- end -}}
{{- if not $fits -}}
{{- fail (printf "config.models: a replica of %s reserves %v CPUs and %v GPUs, and no worker group has pods of that size (resources.limits): it would wait for ever" $model.name $cpus $gpus) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.gateway.enabled .Values.gateway.create (not .Values.gateway.tlsSecretName) -}}
{{- fail "gateway.tlsSecretName is required: keys travel in every request, so the listener needs TLS" -}}
{{- end -}}
{{- if and .Values.gateway.enabled (not .Values.gateway.create) (not .Values.gateway.parentRefs) -}}
{{- fail "gateway.enabled needs gateway.parentRefs (a Gateway of yours) or gateway.create" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not (and .Values.ingress.host .Values.ingress.tlsSecretName)) -}}
{{- fail "ingress.enabled needs ingress.host and ingress.tlsSecretName: keys travel in every request, so it needs TLS" -}}
{{- end -}}
{{- end -}}
