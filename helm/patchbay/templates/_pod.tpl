{{/*
The pod of a Ray node. Called with a dict: root, component (head | worker), spec (the group's values).
KubeRay adds the command, Ray's addresses, the shared-memory volume, Ray's token and the probes that are not set here.
*/}}
{{- define "patchbay.pod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $port := $values.config.port | default 9000 | int -}}
metadata:
  labels:
    {{- include "patchbay.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # A change of the configuration is a change of the pods, which KubeRay answers with a new cluster. The keys are left
    # out on purpose: replicas read their file again by themselves, so a revoked key needs no restart.
    checksum/config: {{ include "patchbay.config" $root | sha256sum }}
    {{- if $values.metrics.annotations }}
    prometheus.io/scrape: "true"
    prometheus.io/port: "8080"
    prometheus.io/path: /metrics
    {{- end }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "patchbay.serviceAccountName" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .spec.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .spec.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .spec.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .spec.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .spec.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .spec.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  containers:
    - name: ray-{{ .component }}
      image: {{ include "patchbay.image" $root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      ports:
        # KubeRay puts ports called serve or serve-* on the Service: gRPC alone. Serve's HTTP port answers health checks
        # only, and goes by another name to stay off it.
        - {name: serve-grpc, containerPort: {{ $port }}, protocol: TCP}
        - {name: http, containerPort: 8000, protocol: TCP}
        - {name: metrics, containerPort: 8080, protocol: TCP}
        {{- if eq .component "head" }}
        - {name: gcs-server, containerPort: 6379, protocol: TCP}
        - {name: dashboard, containerPort: 8265, protocol: TCP}
        - {name: client, containerPort: 10001, protocol: TCP}
        {{- end }}
      env:
        {{- $environment := $root.Files.Get "files/ray-environment.yaml" | fromYaml }}
        {{- if not (dig "ray" "haproxy" true $values.config) }}
        {{- $off := dict "RAY_SERVE_ENABLE_HA_PROXY" "0" "RAY_SERVE_ENABLE_DIRECT_INGRESS" "0" }}
        {{- $environment = mustMergeOverwrite (dict) $environment $off }}
        {{- end }}
        {{- range $name, $value := $environment }}
        - {name: {{ $name }}, value: {{ $value | quote }}}
        {{- end }}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        - {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
        - {name: HF_HOME, value: /var/cache/huggingface}
        {{- if $values.huggingFace.offline }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- end }}
        {{- with $values.huggingFace.tokenSecret }}
        {{- if .name }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
        {{- end }}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if eq .component "worker" }}
      # KubeRay's own worker probe runs wget, which a slim image has not. This asks the same question: has the ingress of
      # this pod a replica to send to? Liveness, and the head's probes, are KubeRay's.
      readinessProbe:
        httpGet: {path: /-/healthz, port: http}
        initialDelaySeconds: 10
        periodSeconds: 5
        timeoutSeconds: 2
        failureThreshold: 2
      {{- end }}
      resources:
        {{- toYaml .spec.resources | nindent 8 }}
      securityContext:
        {{- toYaml $values.securityContext | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: {{ include "patchbay.configPath" $root }}, subPath: patchbay.yaml, readOnly: true}
        {{- if not (include "patchbay.insecure" $root) }}
        # A folder, not a subPath: kubelet renews its files when the Secret changes.
        - {name: keys, mountPath: {{ include "patchbay.keysDir" $root }}, readOnly: true}
        {{- end }}
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/patchbay}
        - {name: model-cache, mountPath: /var/cache/huggingface}
        - {name: artifacts, mountPath: {{ include "patchbay.artifactsDir" $root }}}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ include "patchbay.configName" $root }}}
    {{- if not (include "patchbay.insecure" $root) }}
    - name: keys
      secret:
        secretName: {{ include "patchbay.keysSecretName" $root }}
        items: [{key: keys.json, path: keys.json}]
        defaultMode: 0440
    {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.tmpSize }}}
    - name: home
      emptyDir: {sizeLimit: 1Gi}
    - name: model-cache
      {{- if $values.huggingFace.cache.persistent }}
      persistentVolumeClaim: {claimName: {{ include "patchbay.cacheClaimName" $root }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $values.huggingFace.cache.emptyDirSize }}}
      {{- end }}
    - name: artifacts
      {{- if $values.artifacts.persistent }}
      persistentVolumeClaim: {claimName: {{ include "patchbay.artifactsClaimName" $root }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $values.artifacts.emptyDirSize }}}
      {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
